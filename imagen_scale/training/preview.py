"""Pictures drawn while training, from fixed prompts with the EMA weights."""

import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from imagen_scale.config import StageConfig
from imagen_scale.config.distillation import FewSteps
from imagen_scale.data.blank import is_blank
from imagen_scale.data.embeddings import pad_embeddings
from imagen_scale.data.encoder import MAX_TOKENS
from imagen_scale.data.prepared import Prepared, real_pictures
from imagen_scale.data.split import split
from imagen_scale.diffusion.lowres import resize
from imagen_scale.files.caches import expanded
from imagen_scale.files.pictures import save_grid, to_uint8
from imagen_scale.runs.folders import grid_path, inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.measures import ColourTally, drift, lowres_consistency_db, psnr_db
from imagen_scale.sampling.options import StageSettings, default_spacing, learned_settings
from imagen_scale.sampling.runtimes.contract import Text
from imagen_scale.sampling.stage import Inputs, Stage, default_device
from imagen_scale.training.memory_use import release_memory
from imagen_scale.training.telemetry import Telemetry

GRID_COLUMNS = 8
COLOURS_OF = 64  # real pictures whose colours the base stage's are compared with


class Drawn(NamedTuple):
    """A grid of samples and what was measured on them."""

    path: Path
    measures: dict[str, float]


def show_grid(
    run_dir: Path,
    stage: StageConfig,
    step: int,
    prepared: Prepared,
    telemetry: Telemetry | None,
    say: Callable[[str], None],
) -> None:
    """Draws a grid and reports it, on rank 0; one that cannot be drawn is said."""
    try:
        drawn = draw_grid(run_dir, stage.number, step, prepared)
    # Pictures are a pleasure, not a reason to stop: whatever goes wrong, memory that is full in
    # any library's words included, or a file for sampling that a full disk refused.
    except Exception as error:
        say(f"{stage.name}: no pictures at step {step}: {type(error).__name__}: {error}")
        traceback.clear_frames(error.__traceback__)  # they hold the network
        return
    finally:
        release_memory()
    if telemetry is not None:
        telemetry.write(step, **drawn.measures)
        telemetry.picture(step, drawn.path)


def draw_grid(run_dir: Path, unet_number: int, step: int, prepared: Prepared) -> Drawn:
    """Samples one stage from its inference file, through the code that users run.

    The base stage draws `training.sample_prompts`. A super-resolution stage enlarges real pictures
    of the data set, shown with their input and the original, so that its quality does not depend
    on the stages before it.

    Args:
        run_dir: The run's folder.
        unet_number: Which stage, from 1.
        step: Optimizer steps done, for the file's name.
        prepared: The data set; its embeddings hold the prompts too.

    Returns:
        The PNG file, with the colours' drift from real pictures (levels of 0 to 255) and, of a
        super-resolution stage, how well samples keep to their input and restore the original, dB;
        of a student, the distance from its teacher's pictures (rms of levels from 0 to 1), which
        stand above its own.
    """
    file = read_inference(inference_path(run_dir, unet_number))
    config, training = file.config, file.config.training
    stage = Stage(file, default_device())
    indices = split(config.data, prepared.source).train[:GRID_COLUMNS]
    captions = [prepared.source.captions[i] for i in indices]
    small_size = stage.config.small_size
    if small_size is None:
        captions = list(training.sample_prompts) or captions
        lowres, cond_scale = None, training.sample_cond_scale
    else:
        real = real_pictures(prepared, indices, stage.config.size)
        lowres, cond_scale = resize(real, small_size), 1.0
    store = prepared.embeddings
    # An empty prompt is no text at all, as in sampling.
    embeds = [store[caption][: 0 if is_blank(caption) else None] for caption in captions]
    text = Text(*pad_embeddings(embeds, MAX_TOKENS))
    inputs = Inputs(text, [0] * len(captions), lowres)
    images = stage.sample(inputs, _settings(stage.config, cond_scale))
    stage.close()
    rows, measured = [to_uint8(images)], {}
    if (few := stage.config.few_steps) is not None:  # the teacher's, from the same noise, above
        learned = _teachers(few, unet_number, inputs)
        rows.insert(0, to_uint8(learned))
        rms = (images - learned).div(2).square().mean().sqrt()  # of levels from 0 to 1
        measured["distance_to_teacher"] = rms.item()
    if lowres is not None:
        rows = [to_uint8(lowres), *rows, to_uint8(real)]
    path = grid_path(run_dir, unet_number, step)
    save_grid(path, rows, captions)
    if lowres is None:
        return Drawn(path, _drift(images, prepared, stage.config.size) | measured)
    decibels = {
        "lowres_consistency_db": lowres_consistency_db(images, lowres).mean().item(),
        "psnr_db": psnr_db(images, real).mean().item(),
    }
    measured |= {name: value for name, value in decibels.items() if math.isfinite(value)}
    return Drawn(path, _drift(images, prepared, stage.config.size, indices) | measured)


def _settings(stage: StageConfig, cond_scale: float) -> StageSettings:
    """How a stage draws its grids: as `training` says, or as it learned to."""
    if stage.few_steps is not None:
        return learned_settings(stage.few_steps)
    steps = stage.training.sample_steps
    return StageSettings(steps=steps, cond_scale=cond_scale, spacing=default_spacing(stage))


def _teachers(few: FewSteps, unet_number: int, inputs: Inputs) -> Tensor:
    """What a student's teacher makes of the same."""
    teacher = Stage(read_inference(inference_path(expanded(few.teacher), unet_number)),
                    default_device())  # fmt: skip
    try:
        return teacher.sample(inputs, _settings(teacher.config, few.cond_scale))
    finally:
        teacher.close()


def _drift(
    images: Tensor, prepared: Prepared, size: int, indices: list[int] | None = None
) -> dict[str, float]:
    """How far the colours are from those of some real pictures, of the first ones by default."""
    generated, wanted = ColourTally(), ColourTally()
    generated.add(images)
    for i in indices or range(min(COLOURS_OF, len(prepared.source.keys))):
        wanted.add(real_pictures(prepared, [i], size))
    ours, theirs = generated.colour(), wanted.colour()
    return {
        "colour_drift_mean": 255 * drift(ours.mean, theirs.mean),
        "colour_drift_std": 255 * drift(ours.std, theirs.std),
    }
