"""Runs as they lie on disk: how far each stage is, and what was reported."""

from pathlib import Path
from typing import NamedTuple

from imagen_scale.config import Config, load_config
from imagen_scale.errors import ImagenScaleError
from imagen_scale.runs.checkpoint import list_checkpoints
from imagen_scale.runs.folders import (
    config_path,
    inference_path,
    last_change,
    metrics_path,
    samples_dir,
    unet_dir,
)
from imagen_scale.runs.inference import read_inference
from imagen_scale.runs.records import read_metrics


class StageProgress(NamedTuple):
    """How far one U-Net is."""

    unet: int  # from 1
    size: int  # pixels
    step: int  # optimizer steps done
    steps: int  # in all
    loss: float | None  # last reported
    val_loss: float | None
    is_finished: bool
    checkpoints: list[int]  # steps, newest first


class RunProgress(NamedTuple):
    """One run; `problem` says why there are no stages."""

    folder: Path
    stages: list[StageProgress]
    picture: Path | None  # the newest one
    changed: float  # when something was last written, seconds since 1970
    problem: str | None = None


def find_runs(root: Path) -> list[RunProgress]:
    """The runs under `root`, the one changed last first; a broken one is named, not dropped."""
    runs = [read_progress(file.parent) for file in root.glob("*/config.json")]
    return sorted(runs, key=lambda run: run.changed, reverse=True)


def read_progress(folder: Path) -> RunProgress:
    """One run, as it stands."""
    changed = last_change(folder)
    picture = newest_picture(folder)
    try:
        config = load_config(config_path(folder))
    except ImagenScaleError as error:
        return RunProgress(folder, [], picture, changed, str(error))
    numbers = range(1, len(config.unets) + 1)
    stages = [read_stage_progress(folder, config, number) for number in numbers]
    return RunProgress(folder, stages, picture, changed)


def read_stage_progress(folder: Path, config: Config, unet_number: int) -> StageProgress:
    """How far one U-Net of a run is: by its reports, checkpoints and inference file."""
    stage = config.stage(unet_number)
    steps = stage.steps
    metrics = read_metrics(metrics_path(folder, unet_number), [])
    checkpoints = [
        int(path.name.removeprefix("step_"))
        for path in list_checkpoints(unet_dir(folder, unet_number))
    ]
    done = [metrics.last_step, *checkpoints[:1]]
    path = inference_path(folder, unet_number)
    is_finished = False
    if path.is_file():
        try:
            file = read_inference(path)
            done.append(file.step)
            steps, is_finished = (file.steps, True) if file.is_finished else (steps, False)
        except ImagenScaleError:
            pass  # it is written anew from the newest checkpoint
    return StageProgress(
        unet=unet_number,
        size=stage.size,
        step=max(done),
        steps=steps,
        loss=metrics.last("loss"),
        val_loss=metrics.last("val_loss"),
        is_finished=is_finished,
        checkpoints=checkpoints,
    )


def newest_picture(folder: Path) -> Path | None:
    """The picture written last: a grid drawn while training, or a sample."""
    pictures = [path for path in samples_dir(folder).glob("*.png") if path.is_file()]
    return max(pictures, key=lambda path: path.stat().st_mtime, default=None)
