"""Averages of a stage's weights, measured beside each other."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from imagen_scale.data.prepared import prepare, real_pictures
from imagen_scale.data.sequence import split_indices
from imagen_scale.data.storage import Progress
from imagen_scale.diffusion.lowres import resize
from imagen_scale.evaluation.distances import kernel_distance, require_torchmetrics
from imagen_scale.evaluation.features import open_extractor
from imagen_scale.evaluation.prediction import x_0_errors
from imagen_scale.runs.averages import WORST, find_snapshots, write_average
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.prompts import encode
from imagen_scale.sampling.stage import Inputs, Stage, default_device

WIDTHS = (0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)


class Measured(NamedTuple):
    """One average; lower is better of both measures."""

    width: float | None  # None: what training left
    x_0_error: float
    kid: float | None


def measure_averages(
    run: Path,
    unet_number: int,
    widths: Sequence[float] | None,
    *,
    num: int,
    features: str | None,
    options: SamplingOptions,
    progress: Progress,
    say: Callable[[str], None],
) -> list[Measured]:
    """Measures what training left and averages of other widths on the same pictures.

    Super-resolution is given real pictures made small, so that it is measured by itself.

    Args:
        run: The run's folder.
        unet_number: Of the stage.
        widths: None takes those of `WIDTHS` that the saved averages can make.
        num: Pictures used at most: held-out ones where there are any.
        features: Network for KID, which needs sampling; None leaves it out.
        options: How pictures are sampled for it.
        progress: Told of the work.
        say: Told on which pictures is measured.

    Raises:
        UsageError: If nothing was saved, or a width cannot be made of it.
        ImagenScaleError: If pictures or files cannot be used.
    """
    if features is not None:
        require_torchmetrics()
    extractor = None if features is None else open_extractor(features)
    snapshots = find_snapshots(run, unet_number)
    if widths is None:
        widths = [width for width in WIDTHS if snapshots.mixture(width).error <= WORST]
    config = snapshots.trained.config
    settings = options.for_stages(config.stages(snapshots.trained.text_embed_dim))[unet_number - 1]
    stage_config = snapshots.trained.stage
    prepared = prepare(config, progress=progress)
    train, held_out = split_indices(prepared.source.keys, config.data.val_fraction)
    say(f"measured on {min(num, len(held_out or train))} pictures "
        f"{'held out of' if held_out else 'of'} the training")  # fmt: skip
    indices = (held_out or train)[:num]
    real = real_pictures(prepared, indices, stage_config.size)
    small = stage_config.small_size
    inputs = Inputs(
        encode([snapshots.trained], [prepared.source.captions[i] for i in indices]).text,
        [options.seed + i for i in range(len(indices))],
        None if small is None else resize(real, small),
    )
    found = []
    with TemporaryDirectory(dir=run) as folder:
        for done, width in enumerate([None, *widths]):
            progress("averages", done, len(widths) + 1)
            path = snapshots.trained.path
            if width is not None:
                path = Path(folder) / "average.safetensors"
                write_average(snapshots, width, path)
            stage = Stage(read_inference(path), default_device(), say=say)
            try:
                kid = None
                if extractor is not None:
                    with torch.no_grad():
                        made = stage.sample(inputs, settings)
                    kid = kernel_distance(extractor(made), extractor(real))
                error = x_0_errors(stage, real, inputs).mean().item()
            finally:
                stage.close()
            found.append(Measured(width, error, kid))
    progress("averages", len(widths) + 1, len(widths) + 1)
    return found


def best(measured: Sequence[Measured]) -> Measured:
    """The one with the least KID where it was measured, else with the least error."""

    def by(one: Measured) -> float:
        value = one.x_0_error if one.kid is None else one.kid
        return value if math.isfinite(value) else math.inf

    return min(measured, key=by)
