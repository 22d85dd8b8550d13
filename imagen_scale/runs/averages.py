"""Averages of the weights that are made, after training, of those it saved."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imagen_scale.diffusion.ema_profiles import Mixture, Profile, mixture
from imagen_scale.errors import CheckpointError, UsageError, option
from imagen_scale.files.atomic import write_atomically
from imagen_scale.runs.folders import (
    best_path,
    best_record_path,
    inference_path,
    snapshot_paths,
    trained_path,
)
from imagen_scale.runs.inference import (
    InferenceFile,
    load_weights,
    read_inference,
    save_inference,
    stream_inference,
)

Shapes = dict[str, tuple[torch.dtype, Iterable[int]]]

WORST = 0.1  # error of a mixture that still is the average it is called


class Snapshot(NamedTuple):
    """One saved average."""

    path: Path
    step: int
    width: float


class Snapshots(NamedTuple):
    """Saved averages of one U-Net, those of the training that ended last."""

    trained: InferenceFile  # what training itself left
    files: list[Path]
    profiles: list[Profile]

    def mixture(self, width: float) -> Mixture:
        """How they make up the average of a width at the last step."""
        return mixture(self.profiles, Profile(self.trained.step, width))


def find_snapshots(run: Path, unet_number: int) -> Snapshots:
    """What `training.ema_widths` left.

    Raises:
        CheckpointError: If the stage is not trained or a file is damaged.
        UsageError: If nothing was saved.
    """
    trained = _trained(run, unet_number)
    saved = [one for one in list_snapshots(run, unet_number) if one.step <= trained.step]
    if not saved:
        raise UsageError(
            f"{run}: U-Net {unet_number} has no saved averages up to step {trained.step}. Train "
            f"with training.ema_widths, e.g. [0.05, 0.1]."
        )
    profiles = [Profile(one.step, one.width) for one in saved]
    return Snapshots(trained, [one.path for one in saved], profiles)


def list_snapshots(run: Path, unet_number: int) -> list[Snapshot]:
    """What lies there of `training.ema_widths`, in the order of steps; other files are not told."""
    found = [
        (path, re.fullmatch(r"step_(\d+)_width_(\d+(?:\.\d+)?)", path.stem))
        for path in snapshot_paths(run, unet_number)
    ]
    return [Snapshot(path, int(name[1]), float(name[2])) for path, name in found if name]


def write_average(snapshots: Snapshots, width: float, path: Path) -> None:
    """Writes the inference file of another average; one tensor is in memory at a time.

    Raises:
        CheckpointError: If a saved average is damaged or of another network.
        UsageError: If the saved ones cannot make it.
    """
    made = snapshots.mixture(width)
    if made.error > WORST:
        raise UsageError(
            f"{option('width')} {width:g}: what can be made of the saved averages misses it by "
            f"{made.error:.0%}; take one nearer to those that were kept "
            f"({', '.join(sorted({f'{p.width:g}' for p in snapshots.profiles}))}), or train with "
            f"more snapshots (training.ema_snapshot_every)."
        )
    file = snapshots.trained._replace(path=path, average=f"power function of width {width:g}")
    shapes = _shapes(snapshots.trained.path)
    stream_inference(file, shapes, _mixed(snapshots, made, shapes))


def install(run: Path, unet_number: int, width: float) -> None:
    """Makes sampling use the average of a width; what training left is kept beside the saved ones.

    Raises:
        CheckpointError: As `write_average`, and so is `UsageError`.
    """
    snapshots = find_snapshots(run, unet_number)
    made = _made_path(run, unet_number)
    write_average(snapshots, width, made)
    _put(made, snapshots.trained, run)


def install_best(run: Path, unet_number: int) -> dict[str, Any]:
    """Makes sampling use the average at the best validation; what training left is kept.

    Returns:
        Which validation that was: "measure", "value" and "step".

    Raises:
        CheckpointError: If the stage is not trained or a file is damaged.
        UsageError: If none was kept.
    """
    trained = _trained(run, unet_number)
    path, record = best_path(run, unet_number), best_record_path(run, unet_number)
    if not (path.is_file() and record.is_file()):
        raise UsageError(
            f"{run}: of U-Net {unet_number} no best validation was kept. Train with "
            f"training.keep_best, e.g. val_loss."
        )
    read_inference(path)  # that it is whole
    found = read_best(record)
    # It stands for the whole training, of which it is the best.
    average = f"step {found['step']}, where {found['measure']} was least"
    made = trained._replace(path=_made_path(run, unet_number), average=average)
    weights = load_weights(path)
    save_inference(made, weights)
    _put(made.path, trained, run)
    return found


def read_best(record: Path) -> dict[str, Any]:
    """Which validation was the best one: "measure", "value" and "step".

    And of what: "samples", their number, and "pictures", the fingerprint of all; None where an
    older version did not say.

    Args:
        record: The file of it, `best_record_path`.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        measure, value, step = (found[name] for name in ("measure", "value", "step"))
        of = {name: found.get(name) for name in ("samples", "pictures")}
        return {"measure": str(measure), "value": float(value), "step": int(step), **of}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, AttributeError):
        raise CheckpointError(
            f"{record}: is damaged. Delete it; training with training.keep_best writes it anew."
        ) from None


def _made_path(run: Path, unet_number: int) -> Path:
    """Where another average is written before it takes the place of what is sampled from."""
    return trained_path(run, unet_number).with_name("made.safetensors")


def _trained(run: Path, unet_number: int) -> InferenceFile:
    """What training itself left, in its place or put aside."""
    trained = read_inference(inference_path(run, unet_number))
    return read_inference(trained_path(run, unet_number)) if trained.average else trained


def _put(made: Path, trained: InferenceFile, run: Path) -> None:
    used, kept = (of(run, trained.unet_number) for of in (inference_path, trained_path))
    if trained.path == used:
        write_atomically(kept, lambda temporary: shutil.copyfile(used, temporary))
    made.replace(used)


def restore(run: Path, unet_number: int) -> bool:
    """Puts back what training left; False where it never was taken away.

    Raises:
        CheckpointError: If it is not there.
    """
    used = inference_path(run, unet_number)
    if not read_inference(used).average:
        return False
    kept = trained_path(run, unet_number)
    if not kept.is_file():
        raise CheckpointError(
            f"{kept}: not found: what training left is not here. Copy it from where the run was "
            f"trained."
        )
    kept.replace(used)
    return True


def _shapes(path: Path) -> Shapes:
    with safe_open(path, "pt") as file:
        return {name: (torch.float32, file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict


def _mixed(snapshots: Snapshots, made: Mixture, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    # What no step changed stays what it is: the shares of all steps add up to 1.
    shares = made.coefficients / made.coefficients.sum()
    with ExitStack() as opened:
        files = [opened.enter_context(_snapshot(path, shapes)) for path in snapshots.files]
        for name in shapes:
            whole = None
            for read, share in zip(files, shares.tolist(), strict=True):
                part = share * read(name).double()
                whole = part if whole is None else whole.add_(part)
            assert whole is not None
            yield name, whole.float()


@contextmanager
def _snapshot(path: Path, shapes: Shapes) -> Iterator[Callable[[str], Tensor]]:
    """Reads tensors of a saved average; CheckpointError where it has not what it should."""
    with ExitStack() as opened:

        def read(name: str) -> Tensor:
            with _whole(path):
                tensor: Tensor = file.get_tensor(name)
                if (found := list(tensor.shape)) != (wanted := list(shapes[name][1])):
                    raise SafetensorError(f"{name} is {found}, not {wanted}")
                return tensor

        with _whole(path):
            file = opened.enter_context(safe_open(path, "pt"))
        yield read


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged, or of another network ({error}). Delete it: the averages beside it "
            f"make others of nearly every width."
        ) from None
