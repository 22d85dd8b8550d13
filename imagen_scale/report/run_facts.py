"""A run as its folder tells it: stages, checkpoints, pictures, measures, exports."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from imagen_scale.config import Config, parse_config
from imagen_scale.config.distillation import FewSteps
from imagen_scale.errors import CheckpointError, ConfigError
from imagen_scale.files.atomic import sha256
from imagen_scale.report.embedding import EmbeddedSample, Grid, read_grids, read_samples
from imagen_scale.runs.checkpoint import MANIFEST, list_checkpoints, verify_checkpoint
from imagen_scale.runs.folders import (
    config_path,
    data_report_path,
    evaluation_path,
    export_dirs,
    inference_path,
    metrics_path,
    setup_path,
    unet_dir,
)
from imagen_scale.runs.inference import read_inference
from imagen_scale.runs.records import (
    DataReport,
    EvaluationRecord,
    ExportManifest,
    Metrics,
    SetupFile,
    SetupRecord,
    read_metrics,
    read_record,
)

Progress = Callable[[str, int, int], None]
NOT_CHECKED = "not checked"


class Checkpoint(NamedTuple):
    """A training checkpoint."""

    name: str
    bytes: int
    written: str
    verdict: str  # "verified", "not checked", or what is wrong
    is_good: bool


class Weights(NamedTuple):
    """An inference file."""

    step: int
    steps: int
    bytes: int
    learned: FewSteps | None = None  # of a stage that takes few steps


class StageFacts(NamedTuple):
    """One U-Net of the run."""

    number: int
    size: int | None  # side of its pictures in pixels
    step: int
    steps: int | None
    state: str  # "finished", "under way", "not started"
    last_report: str | None
    metrics: Metrics
    setup: SetupRecord | None
    weights: Weights | None
    checkpoints: list[Checkpoint]
    grids: list[Grid]
    num_grids: int

    @property
    def share(self) -> float | None:
        """Of the steps, how many are done, in [0, 1]."""
        return None if not self.steps else min(1.0, self.step / self.steps)

    @property
    def num_skipped(self) -> int:
        """Steps that training left out, their gradients not being finite."""
        return round(sum(value for _, value in self.metrics.values.get("skipped", [])))


class Export(NamedTuple):
    """An export of one U-Net."""

    folder: str
    manifest: ExportManifest
    bytes: int
    origin: str  # whether it belongs to the weights of now
    is_good: bool


class RunFacts(NamedTuple):
    """All that a report shows."""

    name: str
    config: Config | None
    config_text: str
    stages: list[StageFacts]
    data: DataReport | None
    evaluation: EvaluationRecord | None
    exports: list[Export]
    samples: list[EmbeddedSample]
    problems: list[str]  # what is damaged, in sentences


def read_run_facts(run: Path, *, check: bool, progress: Progress) -> RunFacts:
    """Reads a run's folder.

    Args:
        run: The folder; it has a config.json.
        check: Whether the content of checkpoints and exports is compared with their manifests,
            which reads every byte of them.
        progress: Told of that work.
    """
    problems: list[str] = []
    try:
        text = config_path(run).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        text = ""
        problems.append(f"{run / 'config.json'}: cannot be read: {error.strerror}.")
    config = None
    try:
        config = parse_config(text, source=str(config_path(run)))
    except ConfigError as error:
        problems.append(str(error))
    numbers = {_number(path) for path in run.glob("unet*") if path.is_dir()} - {None}
    if config is not None:
        numbers |= set(range(1, len(config.unets) + 1))
    known = [number for number in numbers if number is not None]
    stages = [_read_stage(run, n, config, problems, check, progress) for n in sorted(known)]
    return RunFacts(
        name=run.resolve().name,
        config=config,
        config_text=text,
        stages=stages,
        data=read_record(data_report_path(run), DataReport, problems),
        evaluation=read_record(evaluation_path(run), EvaluationRecord, problems),
        exports=_read_exports(run, problems, check),
        samples=read_samples(run, problems),
        problems=problems,
    )


def _number(folder: Path) -> int | None:
    digits = folder.name.removeprefix("unet")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 4 else None


def _read_stage(
    run: Path,
    number: int,
    config: Config | None,
    problems: list[str],
    check: bool,
    progress: Progress,
) -> StageFacts:
    folder = unet_dir(run, number)
    metrics = read_metrics(metrics_path(run, number), problems)
    setup = read_record(setup_path(run, number), SetupFile, problems)
    weights = _read_weights(run, number, problems)
    checkpoints = _read_checkpoints(folder, check, progress)
    problems += [f"{folder / one.name}/{one.verdict}" for one in checkpoints
                 if not one.is_good and one.verdict != NOT_CHECKED]  # fmt: skip
    size = steps = None
    if config is not None and number <= len(config.unets):
        stage = config.stage(number)
        size, steps = stage.size, stage.steps
    elif weights is not None:
        steps = weights.steps
    step = max(metrics.last_step, weights.step if weights else 0)
    grids, num_grids = read_grids(run, number, problems)
    is_finished = weights is not None and weights.step >= (steps or weights.steps)
    return StageFacts(
        number=number,
        size=size,
        step=step,
        steps=steps,
        state="finished" if is_finished else "under way" if step else "not started",
        last_report=_written(metrics_path(run, number)),
        metrics=metrics,
        setup=setup.setup if setup else None,
        weights=weights,
        checkpoints=checkpoints,
        grids=grids,
        num_grids=num_grids,
    )


def _read_weights(run: Path, number: int, problems: list[str]) -> Weights | None:
    path = inference_path(run, number)
    if not path.is_file():
        return None
    try:
        file = read_inference(path)
        return Weights(file.step, file.steps, path.stat().st_size, file.stage.few_steps)
    except (CheckpointError, ConfigError) as error:
        problems.append(str(error))
    except (OSError, ValueError, KeyError) as error:
        problems.append(f"{path}: cannot be read: {error}.")
    return None


def _read_checkpoints(folder: Path, check: bool, progress: Progress) -> list[Checkpoint]:
    found, read = list_checkpoints(folder), []
    for i, path in enumerate(found):
        verdict, is_good = NOT_CHECKED, False
        if check:
            progress(f"verifying {folder.name}", i, len(found))
            try:
                verify_checkpoint(path)
                verdict, is_good = "verified", True
            except CheckpointError as error:
                verdict = str(error).removeprefix(f"{path}/")
            except (OSError, KeyError, TypeError, AttributeError, RecursionError):
                verdict = f"{MANIFEST}: missing or damaged."
            progress(f"verifying {folder.name}", i + 1, len(found))
        if not path.exists():  # removed meanwhile: training keeps the newest only
            continue
        size = sum(_size(file) for file in path.rglob("*"))
        read.append(Checkpoint(path.name, size, _written(path) or "", verdict, is_good))
    return read


def _read_exports(run: Path, problems: list[str], check: bool) -> list[Export]:
    read = []
    for path in [folder / "manifest.json" for folder in export_dirs(run)]:
        manifest = read_record(path, ExportManifest, problems)
        if manifest is None:
            continue
        folder, weights = path.parent, inference_path(run, manifest.unet_number)
        origin, is_good = NOT_CHECKED, False
        if not weights.is_file():
            origin = "the weights it was made from are not here"
        elif check:
            is_good = sha256(weights) == manifest.checkpoint_sha256
            origin = "yes" if is_good else "no: trained on since; export again"
        size = sum(record.bytes for record in manifest.files.values())
        name = folder.relative_to(run).as_posix()
        read.append(Export(name, manifest, size, origin, is_good))
    return read


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # removed meanwhile
        return 0


def _written(path: Path) -> str | None:
    try:
        moment = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
    except OSError:
        return None
    return moment.strftime("%Y-%m-%d %H:%M %Z")
