"""All ranks train the same: compared once, before anything is written.

Ranks of one machine read the same files. Those of another may have another version, another
configuration, other pictures, or a folder of its own under the run's name, and training would go on
with a mixture of both. Paths of caches may differ, and so may machines and cards.
"""

import contextlib
import hashlib
import json
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import imagen_scale
from imagen_scale.config import Config
from imagen_scale.data.encoder import encoder_fingerprint, encoder_folder
from imagen_scale.data.prepared import Prepared
from imagen_scale.data.split import split
from imagen_scale.errors import EnvironmentProblem
from imagen_scale.training.meeting import Meeting
from imagen_scale.training.ranks import rank, world_size
from imagen_scale.version import __version__

# Of these another version may compute something else.
PACKAGES = ("torch", "deepspeed", "numpy", "pillow", "transformers", "bitsandbytes")
# What may differ between machines: where each keeps what it prepares; the run's folder is tried.
FREE_KEYS = ("data.cache_dir", "logging.run_dir")
# A folder made a moment ago may be shown late by a network file system, which keeps for so long
# that it was not there.
SEEN_WITHIN_S = 30.0
SAMPLED = 64  # pictures looked at
TOLERANCE = 2  # of a sampled picture's mean colours, of 255: decoders round differently

Facts = dict[str, Any]


def agree(meeting: Meeting, config: Config, call: Facts, prepared: Prepared, run_dir: Path) -> None:
    """Refuses ranks that would train something else than rank 0, or elsewhere; all ranks together.

    Args:
        meeting: Of the ranks.
        config: The run.
        call: What was asked for beside it, as JSON can hold it.
        prepared: What is trained on.
        run_dir: Its folder.

    Raises:
        EnvironmentProblem: Naming the host, what it has and what rank 0 has; the same on all ranks.
    """
    if world_size() == 1:
        return
    told = meeting.gather("facts", json.dumps([platform.node(), _facts(config, call, prepared)]))
    _refuse(meeting, "agreement", lambda: _first_difference([json.loads(text) for text in told]))
    _check_shared(meeting, run_dir)


def _facts(config: Config, call: Facts, prepared: Prepared) -> Facts:
    """All that has to be the same, in the order in which differences are told."""
    source = prepared.source
    train, held_out = split(config.data, source)
    return {
        "imagen-scale": __version__,
        **{name: _version(name) for name in PACKAGES},
        "the code of imagen-scale": _hash_of_sources(),
        **dict(_flat(config.model_dump(mode="json"))),
        **call,
        "the text encoder": encoder_fingerprint(encoder_folder(config.text_encoder)),
        "pictures": len(source),
        "pictures to train on": len(train),
        "pictures held out": len(held_out),
        "names and captions": _hash_of(source.keys, source.captions),
        "mean colours": _mean_colours(prepared),
    }


def _first_difference(told: list[tuple[str, Facts]]) -> str:
    """A sentence about the first rank that has something else than rank 0; "" if there is none."""
    first_host, expected = told[0]
    for number, (host, facts) in enumerate(told):
        for name in expected | facts:
            theirs, ours = facts.get(name), expected.get(name)
            if theirs == ours or (name == "mean colours" and _are_close(theirs, ours)):
                continue
            has = f"has {name} {theirs}, rank 0 (host {first_host}) has {ours}"
            if name == "mean colours":
                has = f"has other pictures under the same names than rank 0 (host {first_host})"
            return (
                f"rank {number} (host {host}) {has}. All processes have to train the same: give "
                f"every machine the same version, configuration, options and data."
            )
    return ""


def _check_shared(meeting: Meeting, run_dir: Path) -> None:
    """Refuses a run's folder that not all ranks see: their shares of checkpoints would be lost.

    Rank 0 leaves a file there, which all look for; afterwards it is removed, and so are the folders
    that were made for it.
    """
    token, made = run_dir / f".meeting_{uuid.uuid4().hex}", []
    if rank() == 0:
        made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        token.write_bytes(b"")
    try:
        name = meeting.heard_from_rank_0("token", lambda: token.name)
        sees = _appears(run_dir, name)
        told = meeting.gather("seen", json.dumps([platform.node(), str(run_dir.resolve()), sees]))
    finally:
        if rank() == 0:
            token.unlink(missing_ok=True)

    def first_blind() -> str:
        blind = [(n, *json.loads(text)) for n, text in enumerate(told) if not json.loads(text)[2]]
        if not blind:
            return ""
        for folder in made:
            folder.rmdir()
        number, host, folder, _ = blind[0]
        return (
            f"rank {number} (host {host}) does not see in {folder} what rank 0 (host "
            f"{platform.node()}) writes there: checkpoints are written by all processes into one "
            f"folder. Put the run on a file system that all machines share (--run)."
        )

    _refuse(meeting, "shared folder", first_blind)


def _appears(folder: Path, name: str) -> bool:
    """Whether a file is there, or comes to be."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while True:
        with contextlib.suppress(OSError):  # listing makes a network file system look again
            if name in [path.name for path in folder.iterdir()]:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def _refuse(meeting: Meeting, what: str, find: Callable[[], str]) -> None:
    """Raises what rank 0 found, if it found something, on all ranks."""
    if found := meeting.heard_from_rank_0(what, find):
        raise EnvironmentProblem(found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hash_of_sources() -> str:
    """Of the installed package's Python files."""
    root = Path(imagen_scale.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _hash_of(*lists: list[str]) -> str:
    digest = hashlib.sha256()
    for words in lists:
        for word in words:
            # Linux allows any bytes in file names.
            digest.update(word.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def _flat(values: Facts, path: str = "") -> Iterator[tuple[str, Any]]:
    """Keys of the configuration with their values."""
    for name, value in values.items():
        where = f"{path}.{name}".lstrip(".")
        if isinstance(value, dict):
            yield from _flat(value, where)
        elif where not in FREE_KEYS:
            yield where, value


def _mean_colours(prepared: Prepared) -> list[list[int]]:
    """Of some pictures at the smallest size that is trained on, in [0, 255]."""
    store = prepared.images[min(prepared.images)]
    step = max(1, len(store) // SAMPLED)
    return [
        [round(float(colour)) for colour in store[i].mean(axis=(1, 2))]
        for i in range(0, len(store), step)
    ]


def _are_close(theirs: Any, ours: Any) -> bool:
    """Whether two lists of mean colours are of the same pictures."""
    pairs = zip(chain(*theirs), chain(*ours), strict=True)
    return all(abs(a - b) <= TOLERANCE for a, b in pairs)
