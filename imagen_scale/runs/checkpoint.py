"""Checkpoints and inference files on disk.

A checkpoint is a folder that either exists whole or does not exist: it is written beside its
final place, hashed, synced and renamed; `manifest.json` is the proof. Checkpoints are found by
looking, never through a pointer file.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagen_scale.config.strict_json import parse_json
from imagen_scale.errors import CheckpointError, DiskProblem
from imagen_scale.files.atomic import clear_temporary, sha256, sync

MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_STAGING_PREFIX = ".staging_"


# Training checkpoints ---------------------------------------------------------------------------


def staging_folder(parent: Path, step: int) -> Path:
    """A fresh folder beside the final one; whatever an earlier crash left there is removed.

    Raises:
        DiskProblem: If something else than a folder stands where the checkpoint is to go.
    """
    final = checkpoint_path(parent, step)
    if os.path.lexists(final) and not final.is_dir():
        raise DiskProblem(
            f"{final}: stands where the checkpoint is to go and is no folder. Move it elsewhere."
        )
    clear_staging(parent)
    folder = parent / f"{_STAGING_PREFIX}{step:08d}"
    folder.mkdir(parents=True)
    return folder


def clear_staging(parent: Path) -> None:
    """Removes what saves that were killed left in a folder that only this training writes to."""
    for leftover in parent.glob(f"{_STAGING_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    clear_temporary(parent)


def commit(staging: Path, step: int, facts: dict[str, Any]) -> Path:
    """Turns a staging folder into a checkpoint.

    Args:
        staging: From `staging_folder`, with every file written by every rank.
        step: Optimizer steps done.
        facts: What a later resume must match, stored in the manifest.
    """
    files = {}
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        digest = sha256(path)
        files[path.relative_to(staging).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": digest,
        }
        sync(path)
    manifest = staging / MANIFEST
    manifest.write_text(json.dumps({"step": step, **facts, "files": files}, indent=1))
    sync(manifest)
    for folder in [*(path for path in staging.rglob("*") if path.is_dir()), staging]:
        sync(folder)
    final = checkpoint_path(staging.parent, step)
    if final.exists():  # the same step again, after a resume that fell back behind it
        _discard(final)
    staging.rename(final)
    sync(final.parent)
    return final


def list_checkpoints(parent: Path) -> list[Path]:
    """Checkpoint folders, newest first; only looked at, not verified.

    A file of such a name is a user's own, and left alone.
    """
    if not parent.is_dir():
        return []
    found = [
        path for path in parent.iterdir() if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(found, key=step_of, reverse=True)


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Checks every file of a checkpoint against its manifest.

    Returns:
        The manifest.

    Raises:
        CheckpointError: Naming the file that is missing or damaged.
    """
    try:
        manifest: dict[str, Any] = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        step, files = manifest["step"], manifest["files"]
        expected = {name: (facts["bytes"], facts["sha256"]) for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder / MANIFEST}: missing or damaged.") from None
    if step != step_of(folder) or not expected:
        raise CheckpointError(f"{folder / MANIFEST}: not that of this checkpoint.")
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{path}: missing or cut short.")
        if sha256(path) != digest:
            raise CheckpointError(f"{path}: its content changed since it was saved.")
    return manifest


def newest_good(
    parent: Path, warn: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | tuple[None, None]:
    """The newest checkpoint that verifies, and its manifest; None when there is none at all.

    Args:
        parent: Folder of one U-Net.
        warn: Told about each damaged checkpoint that is passed over.

    Raises:
        CheckpointError: If there are checkpoints and all are damaged: training never starts
            from step 0 unasked.
    """
    checkpoints = list_checkpoints(parent)
    for folder in checkpoints:
        try:
            return folder, verify_checkpoint(folder)
        except CheckpointError as error:
            warn(f"damaged checkpoint passed over: {error}")
    if checkpoints:
        raise CheckpointError(
            f"{parent}: all {len(checkpoints)} checkpoints are damaged. Restore one from a "
            f"backup, or start anew with --fresh."
        )
    return None, None


def remove_old(
    parent: Path, step: int, keep: int, every: int | None = None, *, good: int | None = None
) -> None:
    """Deletes old checkpoints, right after the commit of `step`.

    Args:
        parent: Folder of one U-Net.
        step: Of the checkpoint just committed.
        keep: How many of the newest stay.
        every: Those of multiples of this step stay too.
        good: Step of the newest good checkpoint before this commit: those between it and `step`,
            and those beyond `step`, were damaged and passed over, and go first.
    """
    checkpoints = list_checkpoints(parent)
    since = step if good is None else good
    passed_over = [f for f in checkpoints if step_of(f) > since and step_of(f) != step]
    whole = [folder for folder in checkpoints if folder not in passed_over]
    old = [f for f in whole[keep:] if every is None or step_of(f) % every]
    for folder in [*passed_over, *old]:
        _discard(folder)


def _discard(folder: Path) -> None:
    if folder.is_symlink():  # to where a user moved it, who may remove it there
        folder.unlink()
        return
    doomed = folder.with_name(f"{_STAGING_PREFIX}{folder.name}")
    folder.rename(doomed)  # never half a checkpoint under its own name
    shutil.rmtree(doomed)


def checkpoint_path(parent: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a U-Net's folder."""
    return parent / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Optimizer steps done at a checkpoint."""
    return int(folder.name.removeprefix("step_"))
