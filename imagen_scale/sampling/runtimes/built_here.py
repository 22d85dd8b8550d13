"""A private record of the engines that this machine's user has built.

An engine is machine code: loading a stranger's means running it. A manifest cannot vouch for an
engine, since whoever swaps the one can rewrite the other; a record outside the run's folder can.
"""

import hashlib
import json
import os
from pathlib import Path

from imagen_scale.files.atomic import write_atomically
from imagen_scale.sampling.runtimes.manifest import EngineFacts


def _record(facts: EngineFacts) -> Path:
    root = Path(os.environ.get("IMAGEN_SCALE_CACHE") or "~/.cache/imagen-scale").expanduser()
    key = hashlib.sha256(facts.model_dump_json().encode()).hexdigest()
    return root / "engines" / f"{key}.json"


def remember(facts: EngineFacts, name: str, sha256: str) -> None:
    """Notes that a file was made here for the engine described by `facts`.

    Args:
        facts: ONNX hash, library, version and targets.
        name: The file's name: the engine, or its runtime cache.
        sha256: Its hash. An earlier build's is kept beside it: builds differ in their bytes.
    """
    path = _record(facts)
    known = _read(path)
    known.setdefault(name, [])
    if sha256 not in known[name]:
        known[name].append(sha256)
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(known, indent=1)))


def is_built_here(facts: EngineFacts, name: str, sha256: str) -> bool:
    """Whether `remember` was told of exactly this file."""
    return sha256 in _read(_record(facts)).get(name, [])


def _read(path: Path) -> dict[str, list[str]]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):  # nothing is known: the engine is built again
        return {}
    return known if isinstance(known, dict) else {}
