"""What was found once and is kept as JSON, so that it need not be found again."""

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

Found = TypeVar("Found")


def read_kept(path: Path, kind: type[Found]) -> Found | None:
    """What `path` keeps; None to find it anew.

    Args:
        path: A JSON file. It may be missing, cut short by a full disk, or damaged by hand.
        kind: What it holds, to the last value: `list[int]`, a named tuple, ...
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValueError):  # pydantic's own is a ValueError
        return None
