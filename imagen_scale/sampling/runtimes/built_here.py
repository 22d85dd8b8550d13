"""A private record of the engines that this machine's user has built.

An engine is machine code: loading a stranger's means running it. A manifest cannot vouch for an
engine, since whoever swaps the one can rewrite the other; a record outside the run's folder can.
"""

import hashlib
import json
from pathlib import Path

from imagen_scale.files.atomic import write_atomically
from imagen_scale.files.caches import cache_root, cannot_write
from imagen_scale.files.kept import read_kept
from imagen_scale.files.locks import locked
from imagen_scale.sampling.runtimes.manifest import EngineFacts

Known = dict[str, list[str]]  # hashes, by the files' names


def _record(facts: EngineFacts) -> Path:
    key = hashlib.sha256(facts.model_dump_json().encode()).hexdigest()
    return cache_root() / "engines" / f"{key}.json"


def remember(facts: EngineFacts, name: str, sha256: str) -> None:
    """Notes that a file was made here for the engine described by `facts`.

    Args:
        facts: ONNX hash, library, version and targets.
        name: The file's name: the engine, or its runtime cache.
        sha256: Its hash. An earlier build's is kept beside it: builds differ in their bytes.

    Raises:
        EnvironmentProblem: If the record cannot be written.
    """
    path = _record(facts)
    try:
        with locked(path.with_suffix(".lock")):  # another build may note its own meanwhile
            known = read_kept(path, Known) or {}
            known.setdefault(name, [])
            if sha256 not in known[name]:
                known[name].append(sha256)
                text = json.dumps(known, indent=1)
                write_atomically(path, lambda temporary: temporary.write_text(text))
    except OSError as error:
        raise cannot_write(path, error) from None


def is_built_here(facts: EngineFacts, name: str, sha256: str) -> bool:
    """Whether `remember` was told of exactly this file."""
    return sha256 in (read_kept(_record(facts), Known) or {}).get(name, [])
