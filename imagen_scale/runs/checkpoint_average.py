"""The averaged weights of a checkpoint, as a file to sample from."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from imagen_scale.errors import UsageError, option
from imagen_scale.runs.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    step_of,
    verify_checkpoint,
)
from imagen_scale.runs.folders import unet_dir
from imagen_scale.runs.inference import InferenceFile, stream_inference
from imagen_scale.runs.shares import Fragment, SavedShares


def kept_steps(run: Path, unet_number: int) -> list[int]:
    """Steps of a U-Net's checkpoints, the first one first."""
    return sorted(map(step_of, list_checkpoints(unet_dir(run, unet_number))))


def check_step(run: Path, unet_number: int, step: int) -> None:
    """Refuses a step of which nothing was kept.

    Raises:
        UsageError: Naming those that were.
    """
    kept = kept_steps(run, unet_number)
    if step not in kept:
        known = f"it has those of {', '.join(map(str, kept))}" if kept else "it has none"
        raise UsageError(
            f"{option('checkpoint')} {step}: U-Net {unet_number} of {run} has no checkpoint of "
            f"that step; {known}. training.keep_every keeps those of a training."
        )


@contextmanager
def averaged_at(run: Path, trained: InferenceFile, step: int) -> Iterator[InferenceFile]:
    """A file to sample from with the average at a checkpoint, for as long as it is needed.

    It lies beside what was saved, where there is room for such files; one tensor is in memory at
    a time.

    Args:
        run: The run's folder.
        trained: Of the same U-Net, written by any step.
        step: Of a checkpoint.

    Raises:
        CheckpointError: If the checkpoint is damaged or of another network.
        UsageError: If there is none.
    """
    check_step(run, trained.unet_number, step)
    folder = checkpoint_path(unet_dir(run, trained.unet_number), step)
    verify_checkpoint(folder)
    with (
        tempfile.TemporaryDirectory(prefix=".average_", dir=run) as place,
        ExitStack() as opened,
    ):
        saved = SavedShares(folder, opened)
        weights = opened.enter_context(safe_open(trained.path, "pt"))
        shapes = {
            name: (torch.float32, torch.Size(weights.get_slice(name).get_shape()))
            for name in weights.keys()  # noqa: SIM118 - not a dict
        }

        def average() -> Iterator[tuple[str, Tensor]]:
            for name, (_, shape) in shapes.items():
                if name not in saved.places:  # a buffer, which no step changes
                    yield name, weights.get_tensor(name)
                    continue
                whole = torch.empty(shape)
                saved.assemble([Fragment(name, 0, whole.numel(), 0)], "ema", whole)
                yield name, whole

        path = Path(place) / trained.path.name
        file = trained._replace(path=path, step=step, average=f"checkpoint of step {step}")
        stream_inference(file, shapes, average())
        yield file
