"""Checkpoints and inference files on disk.

A checkpoint is a folder that either exists whole or does not exist: it is written beside its
final place, hashed, synced and renamed; `manifest.json` is the proof. Checkpoints are found by
looking, never through a pointer file.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from imagen_scale.config import Config, dump_config, parse_config
from imagen_scale.errors import CheckpointError, UsageError
from imagen_scale.strict_json import parse_json
from imagen_scale.tensor_file import write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MANIFEST = "manifest.json"
INFERENCE_FORMAT = "imagen-scale inference 1"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_STAGING_PREFIX = ".staging_"


def unet_dir(run_dir: Path, unet_number: int) -> Path:
    """Folder of one U-Net's checkpoints and inference file inside a run."""
    return run_dir / f"unet{unet_number}"


def inference_path(run_dir: Path, unet_number: int) -> Path:
    """The file that sampling reads."""
    return unet_dir(run_dir, unet_number) / "inference.safetensors"


# Training checkpoints ---------------------------------------------------------------------------


def staging_folder(parent: Path, step: int) -> Path:
    """A fresh folder beside the final one; whatever an earlier crash left there is removed."""
    clear_staging(parent)
    folder = parent / f"{_STAGING_PREFIX}{step:08d}"
    folder.mkdir(parents=True)
    return folder


def clear_staging(parent: Path) -> None:
    """Removes what saves that were killed left in a folder that only this training writes to."""
    for leftover in parent.glob(f"{_STAGING_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    clear_temporary(parent)


def clear_temporary(parent: Path, name: str = "*") -> None:
    """Removes what kills left of `write_atomically`, of files whose names match."""
    for leftover in parent.glob(f".{name}.*.tmp"):
        leftover.unlink(missing_ok=True)


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
        _sync(path)
    manifest = staging / MANIFEST
    manifest.write_text(json.dumps({"step": step, **facts, "files": files}, indent=1))
    _sync(manifest)
    for folder in [*(path for path in staging.rglob("*") if path.is_dir()), staging]:
        _sync(folder)
    final = staging.parent / f"step_{step:08d}"
    if final.exists():  # the same step again, after a resume that fell back behind it
        _discard(final)
    staging.rename(final)
    _sync(final.parent)
    return final


def list_checkpoints(parent: Path) -> list[Path]:
    """Checkpoint folders, newest first; only looked at, not verified."""
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def verify(folder: Path) -> dict[str, Any]:
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
    if step != _step_of(folder) or not expected:
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
            return folder, verify(folder)
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
    passed_over = [f for f in checkpoints if _step_of(f) > since and _step_of(f) != step]
    whole = [folder for folder in checkpoints if folder not in passed_over]
    old = [f for f in whole[keep:] if every is None or _step_of(f) % every]
    for folder in [*passed_over, *old]:
        _discard(folder)


def _discard(folder: Path) -> None:
    doomed = folder.with_name(f"{_STAGING_PREFIX}{folder.name}")
    folder.rename(doomed)  # never half a checkpoint under its own name
    shutil.rmtree(doomed)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside its place and renames it, so that readers never see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# Inference files --------------------------------------------------------------------------------


class InferenceFile(NamedTuple):
    """What the header of an inference file says."""

    path: Path
    config: Config
    unet_number: int
    text_embed_dim: int
    text_fingerprint: str
    step: int
    steps: int

    @property
    def is_finished(self) -> bool:
        """Whether training had reached its last step."""
        return self.step >= self.steps


def save_inference(
    path: Path,
    weights: "Mapping[str, Tensor]",
    *,
    config: Config,
    unet_number: int,
    text_embed_dim: int,
    text_fingerprint: str,
    step: int,
    steps: int,
) -> None:
    """Writes EMA weights with the configuration inside; one file is all that sampling needs."""
    stream_inference(
        path,
        {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()},
        weights.items(),
        config=config,
        unet_number=unet_number,
        text_embed_dim=text_embed_dim,
        text_fingerprint=text_fingerprint,
        step=step,
        steps=steps,
    )


def stream_inference(
    path: Path,
    shapes: "Mapping[str, tuple[torch.dtype, Iterable[int]]]",
    weights: "Iterable[tuple[str, Tensor]]",
    *,
    config: Config,
    unet_number: int,
    text_embed_dim: int,
    text_fingerprint: str,
    step: int,
    steps: int,
) -> None:
    """`save_inference` of weights that come one at a time, in the order of `shapes`."""
    metadata = {
        "format": INFERENCE_FORMAT,
        "config": dump_config(config),
        "unet_number": str(unet_number),
        "text_embed_dim": str(text_embed_dim),
        "text_fingerprint": text_fingerprint,
        "step": str(step),
        "steps": str(steps),
    }
    write_atomically(path, lambda temporary: write_tensors(temporary, shapes, weights, metadata))


def read_inference(path: Path) -> InferenceFile:
    """Reads the header of an inference file.

    Raises:
        CheckpointError: If it is missing, damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: not found.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error}). Restore it from a checkpoint.") from None
    if metadata.get("format") != INFERENCE_FORMAT:
        raise CheckpointError(f"{path}: not an inference file of imagen-scale.")
    return InferenceFile(
        path=path,
        config=parse_config(metadata["config"], source=str(path)),
        unet_number=int(metadata["unet_number"]),
        text_embed_dim=int(metadata["text_embed_dim"]),
        text_fingerprint=metadata["text_fingerprint"],
        step=int(metadata["step"]),
        steps=int(metadata["steps"]),
    )


def load_weights(path: Path) -> dict[str, "Tensor"]:
    """The tensors of an inference file, on the CPU."""
    from safetensors.torch import load_file

    return load_file(path)


# Runs -------------------------------------------------------------------------------------------


def find_run(run: str | Path | None, root: Path = Path("runs")) -> Path:
    """The run asked for, by folder or by name under `root`; or the newest one there.

    Raises:
        UsageError: If there is none; the message names where it looked, and the nearest name.
    """
    runs = [path.parent for path in root.glob("*/config.json")]
    if run is not None:
        for folder in (Path(run), root / run):
            if (folder / "config.json").is_file():
                return folder
        names = [folder.name for folder in runs]
        close = difflib.get_close_matches(Path(run).name, names, n=1)
        raise UsageError(
            f"{run}: not a run folder (it has no config.json)."
            + (f" Did you mean {root / close[0]}?" if close else "")
            + (f" Runs under {root}: {', '.join(sorted(names))}." if names else "")
        )
    if not runs:
        raise UsageError(
            f"no run found under {root.resolve()}. Train one with `deepspeed launch/train.py "
            f"--config configs/emoji_demo.json`, or name one with --run."
        )
    return max(runs, key=_last_change)


def _last_change(run: Path) -> float:
    """When training last wrote into a run."""
    files = [run / "config.json", *run.glob("unet*/*")]
    return max(path.stat().st_mtime for path in files)
