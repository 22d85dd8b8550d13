"""Runs as they lie on disk: how far each stage is, and what was reported."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from imagen_scale.config import Config, load_config
from imagen_scale.errors import ImagenScaleError
from imagen_scale.runs.checkpoint import list_checkpoints
from imagen_scale.runs.folders import inference_path, unet_dir
from imagen_scale.runs.inference import read_inference


class Stage(NamedTuple):
    """How far one U-Net is."""

    unet: int  # from 1
    size: int  # pixels
    step: int  # optimizer steps done
    steps: int  # in all
    loss: float | None  # last reported
    val_loss: float | None
    is_finished: bool
    checkpoints: list[int]  # steps, newest first


class Run(NamedTuple):
    """One run; `problem` says why there are no stages."""

    folder: Path
    stages: list[Stage]
    picture: Path | None  # the newest one
    changed: float  # when something was last written, seconds since 1970
    problem: str | None = None


def find_runs(root: Path) -> list[Run]:
    """The runs under `root`, the one changed last first; a broken one is named, not dropped."""
    runs = [read_run(file.parent) for file in root.glob("*/config.json")]
    return sorted(runs, key=lambda run: run.changed, reverse=True)


def read_run(folder: Path) -> Run:
    """One run, as it stands."""
    files = [folder / "config.json", *folder.glob("unet*/*")]
    changed = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
    picture = newest_picture(folder)
    try:
        config = load_config(folder / "config.json")
    except ImagenScaleError as error:
        return Run(folder, [], picture, changed, str(error))
    numbers = range(1, len(config.unets) + 1)
    stages = [read_stage_progress(folder, config, number) for number in numbers]
    return Run(folder, stages, picture, changed)


def read_stage_progress(folder: Path, config: Config, unet_number: int) -> Stage:
    """How far one U-Net of a run is: by its reports, checkpoints and inference file."""
    stage = config.stage(unet_number)
    steps = stage.steps
    rows = read_metrics(folder, unet_number)
    checkpoints = [
        int(path.name.removeprefix("step_"))
        for path in list_checkpoints(unet_dir(folder, unet_number))
    ]
    done = [row["step"] for row in rows[-1:]] + checkpoints[:1]
    path = inference_path(folder, unet_number)
    is_finished = False
    if path.is_file():
        try:
            file = read_inference(path)
            done.append(file.step)
            steps, is_finished = (file.steps, True) if file.is_finished else (steps, False)
        except ImagenScaleError:
            pass  # it is written anew from the newest checkpoint
    return Stage(
        unet=unet_number,
        size=stage.size,
        step=max(done, default=0),
        steps=steps,
        loss=_last(rows, "loss"),
        val_loss=_last(rows, "val_loss"),
        is_finished=is_finished,
        checkpoints=checkpoints,
    )


def read_metrics(folder: Path, unet_number: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first; a line that is being written is left out."""
    try:
        text = (unet_dir(folder, unet_number) / "metrics.jsonl").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def newest_picture(folder: Path) -> Path | None:
    """The picture written last: a grid drawn while training, or a sample."""
    pictures = list((folder / "samples").glob("*.png"))
    return max(pictures, key=lambda path: path.stat().st_mtime, default=None)


def _last(rows: list[dict[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)
