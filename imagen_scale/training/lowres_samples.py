"""Training pictures as the stage before draws them, made once for `training.lowres_samples`."""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from imagen_scale.config import Config, StageConfig
from imagen_scale.data.embeddings import pad_embeddings
from imagen_scale.data.encoder import MAX_TOKENS
from imagen_scale.data.prepared import Prepared
from imagen_scale.data.seeds import seeded
from imagen_scale.diffusion.spacing import visited_times
from imagen_scale.errors import CheckpointError, ConfigError
from imagen_scale.files.atomic import sha256, write_atomically
from imagen_scale.files.pictures import to_uint8
from imagen_scale.runs.folders import inference_path, lowres_samples_path
from imagen_scale.runs.inference import InferenceFile, read_inference
from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.sampling.real_inputs import real_inputs
from imagen_scale.sampling.redraw import redraw
from imagen_scale.sampling.runtimes.contract import Text
from imagen_scale.sampling.stage import Stage, default_device
from imagen_scale.sampling.stage_schedule import stage_schedule
from imagen_scale.training.memory_use import release_memory

MOST_PIXELS = 2**24  # of all of them: 4096 pictures of 64 px, 256 of 256 px
KEPT = 0.3, 0.8  # alpha_bar where they are drawn from, evenly between
LEVELS = 8  # of it: pictures of one level are drawn together

Drawn = dict[int, npt.NDArray[np.uint8]]


def check_stage_before(stage: StageConfig, run_dir: Path, numbers: Sequence[int]) -> None:
    """Refuses a stage that is to learn from samples of one that is not trained.

    Args:
        stage: The stage.
        run_dir: Its run.
        numbers: What is trained now, in order.

    Raises:
        ConfigError: Naming the key.
    """
    before = stage.number - 1
    if not stage.training.lowres_samples or before == 0 or before in numbers:
        return
    try:
        is_there = read_inference(inference_path(run_dir, before)).is_finished
    except CheckpointError:
        is_there = False
    if not is_there:
        raise ConfigError(
            f"training.lowres_samples: {stage.name} learns from samples of U-Net {before}, which "
            f"is not trained in {run_dir}; train it first (--unet {before}), or set this to 0."
        )


def draws_from_between(file: InferenceFile) -> bool:
    """Whether a stage can be started from a picture under noise: of few steps none may be there.

    Args:
        file: The stage's own: where it was taken over, its run does not tell its steps.
    """
    settings = _settings(file.config, file.unet_number)
    schedule = stage_schedule(file.stage)
    times = visited_times(schedule, settings.steps, settings.spacing)
    return any(schedule.abar[t] >= KEPT[0] for t in times)


def draw_samples(
    stage: StageConfig, run_dir: Path, prepared: Prepared, train: Sequence[int],
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Draws the pictures and keeps them in the run, unless that was done with the same weights.

    Args:
        stage: That is to learn from them.
        run_dir: The run; its stage before is trained.
        prepared: The pictures.
        train: Which are trained on; of very many some, evenly chosen.
        say: Told that it takes a while.
    """
    before = read_inference(inference_path(run_dir, stage.number - 1))
    path = lowres_samples_path(run_dir, stage.number)
    made_of = {"origin": sha256(before.path), "pictures": prepared.source.fingerprint}
    if path.is_file() and _metadata(path) == made_of:
        return
    size = before.stage.size
    most = max(1, MOST_PIXELS // size**2)
    chosen = train[:: -(-len(train) // most)]
    say(f"{stage.name}: drawing {len(chosen)} pictures with U-Net {before.unet_number} to learn "
        f"from (training.lowres_samples)")  # fmt: skip
    try:
        indices, pictures = _redrawn(before, prepared, chosen)
    finally:
        release_memory()
    tensors = {"indices": torch.tensor(indices), "pictures": pictures}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, made_of))


def read_samples(stage: StageConfig, run_dir: Path) -> Drawn:
    """What `draw_samples` left: pictures (3, h, h) by their number in the source."""
    with safe_open(lowres_samples_path(run_dir, stage.number), "np") as file:
        indices, pictures = file.get_tensor("indices"), file.get_tensor("pictures")
    return dict(zip(indices.tolist(), pictures, strict=True))


def _redrawn(
    before: InferenceFile, prepared: Prepared, indices: Sequence[int]
) -> tuple[list[int], torch.Tensor]:
    """Pictures as a stage draws them from its default settings, (N, 3, h, h) uint8, and which."""
    drawn: list[int] = []
    parts = []
    least, most = KEPT
    with closing(Stage(before, default_device())) as stage:
        settings = _settings(before.config, before.unet_number)
        together = stage.batch_size()
        for level in range(LEVELS):
            kept = least + (most - least) * (level + 0.5) / LEVELS
            of_level = [i for i in indices if seeded("kept", i) * LEVELS >> 63 == level]
            for start in range(0, len(of_level), together):
                part = of_level[start : start + together]
                embeds = [prepared.embeddings.stored(prepared.source.captions[i]) for i in part]
                features, mask = pad_embeddings(embeds, MAX_TOKENS)
                text = Text(features.float(), mask)
                inputs, real = real_inputs(prepared, part, stage.config, text, seed=len(drawn))
                parts.append(to_uint8(redraw(stage, real, inputs, settings, kept=kept)))
                drawn += part
    return drawn, torch.from_numpy(np.concatenate(parts).transpose(0, 3, 1, 2).copy())


def _settings(config: Config, unet_number: int) -> StageSettings:
    """How a stage draws where nothing is asked for."""
    return SamplingOptions().for_stages(config.stages()[:unet_number])[-1]


def _metadata(path: Path) -> dict[str, str]:
    """What a file says it was made of; nothing where it is damaged, so that it is made anew."""
    try:
        with safe_open(path, "np") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}
