"""The teacher of a stage that learns to take few steps: found, checked, and beside the student."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from imagen_scale.config import Config, StageConfig
from imagen_scale.config.distillation import FewSteps
from imagen_scale.diffusion.denoiser import Denoiser
from imagen_scale.diffusion.distillation import Segments
from imagen_scale.diffusion.spacing import visited_times
from imagen_scale.errors import ConfigError
from imagen_scale.files.atomic import write_atomically
from imagen_scale.files.caches import expanded
from imagen_scale.planning.setup import Setup
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.runtimes.contract import Conditioning, Say
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.runtimes.torch_unet import TorchRuntime
from imagen_scale.sampling.stage import thresholding
from imagen_scale.sampling.stage_schedule import stage_schedule
from imagen_scale.training.origin import Origin, read_origin

KEY = "distill.teacher"


class Teacher:
    """A trained stage, frozen, in the precision of training; each rank holds all of it.

    Args:
        file: Its inference file.
        stage: The student.
        setup: How the student is trained.
        device: Where to compute.
        say: Told when memory is too short for both branches of guidance at once.
    """

    def __init__(
        self, file: InferenceFile, stage: StageConfig, setup: Setup, device: torch.device, say: Say
    ) -> None:
        few = stage.few_steps
        assert few is not None
        options = RuntimeOptions.make(runtime="torch", precision=setup.precision)
        self.runtime = TorchRuntime(file, device, options, say=say)
        self.threshold = thresholding(file.stage, None)
        own = file.stage.few_steps
        # What a student learned holds its guidance already.
        self.cond_scale = few.cond_scale if own is None else 1.0
        self.segments = segments_of(stage, file.stage).to(device)

    def bind(self, cond: Conditioning) -> Denoiser:
        """Predicts clean pictures as in sampling: guided and thresholded."""
        denoiser = self.runtime.bind(cond._replace(cond_scale=self.cond_scale))

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            return self.threshold(denoiser(x_t, t))

        return predict


def segments_of(stage: StageConfig, teacher: StageConfig) -> Segments:
    """The steps of a student, with those of its teacher.

    Raises:
        ConfigError: If the teacher has no times for them.
    """
    few, own = stage.few_steps, teacher.few_steps
    assert few is not None
    schedule = stage_schedule(stage)
    if own is not None:
        segments = Segments.of(schedule, few.steps, own.steps, "ddim", few.spacing)
        if segments.times.flatten().tolist() != visited_times(schedule, own.steps, own.spacing):
            raise ConfigError(
                f"distill.steps: the times of {few.steps} steps are not among the {own.steps} that "
                f"{few.teacher} learned; distill its own teacher {own.teacher} instead."
            )
        return segments
    total = few.steps_of_ordinary_teacher
    return Segments.of(schedule, few.steps, total, "dpmpp_2m", few.spacing)


def find_teacher(config: Config, unet_number: int, run_dir: Path) -> Origin:
    """The teacher of a U-Net, or what is taken over in its place, checked.

    Args:
        config: The run, which has the section `distill`.
        unet_number: From 1.
        run_dir: Its folder.

    Raises:
        ConfigError: If there is no such stage, it is not trained to its end, or another student
            than this is its.
        CheckpointError: If its file is damaged.
    """
    stage = config.stage(unet_number)
    assert config.distill is not None
    run = expanded(config.distill.teacher)
    origin = read_origin(config, unet_number, run, run_dir, key=KEY)
    if few := stage.few_steps:
        problems = list(_differences(stage, origin.file.stage, run))
        problems += _too_many_steps(stage, few, origin.file.stage, run)
        if problems:
            raise ConfigError("\n".join(problems))
        segments_of(stage, origin.file.stage)  # refuses times that do not fit
    return origin


def take_over(origin: Origin, run_dir: Path, say: Say) -> None:
    """Copies the file of a stage that is not distilled into the run, unless it is there."""
    file = origin.file
    path = inference_path(run_dir, file.unet_number)
    write_atomically(path, lambda temporary: shutil.copyfile(file.path, temporary))
    say(f"{file.stage.name}: taken over from {file.path.parents[1]} as it is (step {file.step})")


def _differences(stage: StageConfig, teacher: StageConfig, run: Path) -> Iterator[str]:
    """A sentence for each value that a student has from its teacher and this one has not."""
    entry, theirs = stage.number - 1, teacher.unet
    if theirs.pred_type == "eps":
        yield (
            f"{KEY}: {stage.name} of {run} predicts the noise, which says nothing of the picture "
            f"where a student's first step is taken; train it on as v first, with --set "
            f"training.start_from={run} --set unets.{entry}.pred_type=v and some of its steps."
        )
        return
    pairs = {
        f"unets.{entry}.pred_type": (stage.unet.pred_type, theirs.pred_type),
        f"unets.{entry}.schedule": (stage.unet.schedule, theirs.schedule),
        f"unets.{entry}.lowres_residual": (stage.unet.lowres_residual, theirs.lowres_residual),
        "imagen.timesteps": (stage.timesteps, teacher.timesteps),
        "imagen.image_sizes": ((stage.small_size, stage.size), (teacher.small_size, teacher.size)),
    }
    for key, (ours, other) in pairs.items():
        if ours != other:
            yield (
                f"{key}: another than that of {stage.name} of {run}, whose steps a student learns; "
                f"take its value."
            )


def _too_many_steps(
    stage: StageConfig, few: FewSteps, teacher: StageConfig, run: Path
) -> Iterator[str]:
    """What is wrong with the steps and the guidance of a student whose teacher is one."""
    own = teacher.few_steps
    if own is None:
        return
    if few.steps >= own.steps or own.steps % few.steps:
        yield (
            f"distill.steps: {few.steps} for {stage.name}, but its teacher {run} takes "
            f"{own.steps} itself; write a smaller number that divides {own.steps}"
            + (", or null to take it over." if own.steps == 1 else ".")
        )
    if few.teacher_steps not in (None, own.steps):
        yield f"distill.teacher_steps: {run} takes {own.steps} for {stage.name}; write null."
    if few.spacing != own.spacing:
        yield (
            f"distill.spacing: {few.spacing}, but its teacher {run} has learned steps of spacing "
            f"{own.spacing}; write {own.spacing}."
        )
    if few.cond_scale != own.cond_scale:
        yield (
            f"distill.cond_scale: {few.cond_scale:g} for {stage.name}, but guidance "
            f"{own.cond_scale:g} is built into its teacher {run}; write {own.cond_scale:g}."
        )
