"""Averages of a stage's weights, measured beside each other."""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from imagen_scale.data.prepared import prepare
from imagen_scale.data.storage import Progress
from imagen_scale.errors import UsageError, option
from imagen_scale.evaluation.distances import kernel_distance, require_torchmetrics
from imagen_scale.evaluation.features import open_extractor
from imagen_scale.evaluation.prediction import x_0_errors
from imagen_scale.evaluation.run import choose_pictures
from imagen_scale.runs.averages import WORST, find_snapshots, write_average
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.prompts import encode
from imagen_scale.sampling.real_inputs import real_inputs
from imagen_scale.sampling.stage import Stage, default_device

COND_SCALE = 2.0  # of the base stage, where KID is measured
WIDTHS = (0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)


class Measured(NamedTuple):
    """One average; lower is better of both measures."""

    width: float | None  # None: what training left
    x_0_error: float | None  # None: of few steps, which know none of the levels between theirs
    kid: float | None


def measure_averages(
    run: Path,
    unet_number: int,
    *,
    num: int,
    features: str | None,
    options: SamplingOptions,
    progress: Progress,
    say: Callable[[str], None],
) -> list[Measured]:
    """Measures what training left and averages of `WIDTHS`, as far as the saved ones make them.

    Super-resolution is given real pictures made small, so that it is measured by itself.

    Args:
        run: The run's folder.
        unet_number: Of the stage.
        num: Pictures used at most: held-out ones where there are any.
        features: Network for KID, which needs sampling; None leaves it out.
        options: How pictures are sampled for it; guidance is the stage's own.
        progress: Told of the work.
        say: Told where no pictures were held out.

    Raises:
        UsageError: If nothing was saved, or a stage of few steps is to be measured without KID.
        ImagenScaleError: If pictures or files cannot be used.
    """
    if features is not None:
        require_torchmetrics()
    extractor = None if features is None else open_extractor(features)
    snapshots = find_snapshots(run, unet_number)
    widths = [width for width in WIDTHS if snapshots.mixture(width).error <= WORST]
    config, own = snapshots.trained.config, snapshots.trained.stage
    if own.few_steps is not None and features is None:
        raise UsageError(
            f"{option('features')}: {own.name} takes {own.few_steps.steps} steps, of which the "
            f"error of the predicted picture says little; give a network for KID, e.g. "
            f"efficientnet-lite0."
        )
    if own.few_steps is None and "cond_scale" not in options.model_fields_set:
        options = options.model_copy(update={"cond_scale": COND_SCALE if unet_number == 1 else 1.0})
    settings = options.for_stages([own])[0]
    prepared = prepare(config, progress=progress)
    _, indices, _ = choose_pictures(config, prepared, None, say)
    indices = indices[:num]
    if features is not None and len(indices) < 2:
        raise UsageError(
            f"{option('features')}: {len(indices)} picture has no KID; hold out more "
            f"(data.val_fraction), or leave it out."
        )
    text = encode([snapshots.trained], [prepared.source.captions[i] for i in indices]).text
    inputs, real = real_inputs(prepared, indices, own, text, options.seed)
    found = []
    with TemporaryDirectory(dir=run) as folder:
        for done, width in enumerate([None, *widths]):
            progress("averages", done, len(widths) + 1)
            path = snapshots.trained.path
            if width is not None:
                path = Path(folder) / "average.safetensors"
                write_average(snapshots, width, path)
            with closing(Stage(read_inference(path), default_device(), say=say)) as stage:
                kid = None
                if extractor is not None:
                    made = stage.sample(inputs, settings)
                    kid = kernel_distance(extractor(made), extractor(real))
                error = None
                if own.few_steps is None:
                    error = x_0_errors(stage, real, inputs).mean().item()
            found.append(Measured(width, error, kid))
    progress("averages", len(widths) + 1, len(widths) + 1)
    return found


def best(measured: Sequence[Measured]) -> Measured:
    """The one with the least KID where it was measured, else with the least error."""

    def by(one: Measured) -> float:
        value = one.x_0_error if one.kid is None else one.kid
        return math.inf if value is None or not math.isfinite(value) else value

    return min(measured, key=by)
