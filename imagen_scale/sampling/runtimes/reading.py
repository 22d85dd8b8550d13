"""Reads what an export says of itself in JSON."""

import json
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from imagen_scale.config.section import Section
from imagen_scale.errors import ExportError

Record = TypeVar("Record", bound=Section)


def read_record(path: Path, kind: type[Record], schema_version: int) -> Record:
    """The record of an export or a bundle.

    Args:
        path: A JSON file that is there.
        kind: What it holds.
        schema_version: That this program reads.

    Raises:
        ExportError: If it is damaged, or of another schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["schema_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise damaged(path, "it is not JSON with a schema_version") from None
    if version != schema_version:
        raise ExportError(
            f"{path}: has schema version {version}; this program reads {schema_version}. Export "
            f"again with --force, or use the imagen-scale that wrote it."
        )
    try:
        return kind.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise damaged(path, f"{where}: {first['msg']}") from None


def damaged(path: Path, reason: str) -> ExportError:
    """What is said of a record that is not as this program writes it."""
    return ExportError(f"{path}: damaged: {reason}. Export again with --force.")
