"""What fewer steps cost: each stage in several numbers of steps, students beside teachers."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from imagen_scale.config import StageConfig
from imagen_scale.data.prepared import prepare
from imagen_scale.data.storage import Progress
from imagen_scale.diffusion.guidance import branches, guided_times
from imagen_scale.diffusion.lowres import resize, shrink_and_enlarge
from imagen_scale.diffusion.reverse import evaluated_times
from imagen_scale.diffusion.spacing import visited_times
from imagen_scale.errors import UsageError, option
from imagen_scale.evaluation.measurement import MAX_DB, pictures_together
from imagen_scale.evaluation.run import Split, choose_pictures
from imagen_scale.files.atomic import write_atomically
from imagen_scale.files.caches import expanded
from imagen_scale.runs.folders import steps_table_path
from imagen_scale.runs.inference import InferenceFile, read_stage
from imagen_scale.sampling.measures import psnr_db, retrieval_accuracy, ssim
from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.sampling.prompts import encode
from imagen_scale.sampling.real_inputs import real_inputs
from imagen_scale.sampling.runtimes.contract import Say, Text
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stage import Inputs, Stage
from imagen_scale.sampling.stage_schedule import stage_schedule
from imagen_scale.sampling.stages import TrainedStages

STEPS = (25, 8, 4, 2, 1)


class Row(NamedTuple):
    """One stage in one number of steps, mean over the captions."""

    unet: int  # from 1
    size: int
    who: str  # "itself", or of what is distilled "teacher" or "student"
    steps: int
    evaluations: int  # of the network for a picture
    retrieval_accuracy: float  # in [0, 1]
    distance: float  # rms from the real picture, of levels from 0 to 1
    from_first: float  # the same from the stage's first row, made from the same noise
    psnr_db: float
    ssim: float
    detail: float | None  # super-resolution: energy beyond its input's size, of the real one's


class _Way(NamedTuple):
    """A network and how it is sampled."""

    who: str
    file: InferenceFile
    settings: StageSettings

    @property
    def evaluations(self) -> int:
        """Both branches of guidance count, where it acts; those that reuse features count whole."""
        settings, stage = self.settings, self.file.stage
        times = visited_times(stage_schedule(stage), settings.steps, settings.spacing)
        guided = set(times)
        if settings.guidance_interval and settings.cond_scale > 1:
            guided = set(guided_times(times, settings.guidance_interval))
        both = len(branches(settings.cond_scale))
        return sum(both if t in guided else 1 for t in evaluated_times(settings.sampler, times))


class _Tally:
    """Sums of one row, and thumbnails."""

    def __init__(self) -> None:
        self.kept: dict[str, list[Tensor]] = {}

    def add(
        self, images: Tensor, real: Tensor, first: Tensor, small: int | None, side: int
    ) -> None:
        values = {
            "made": resize(images, side), "real": resize(real, side),
            "error": _squared(images, real), "from first": _squared(images, first),
            "psnr": psnr_db(images, real).clamp(max=MAX_DB), "ssim": ssim(images, real),
        }  # fmt: skip
        if small is not None:
            pair = ((one - shrink_and_enlarge(one, small)) for one in (images, real))
            ours, theirs = (one.square().flatten(1).mean(1) for one in pair)
            values |= {"our detail": ours, "real detail": theirs}
        for name, value in values.items():
            self.kept.setdefault(name, []).append(value)

    def row(self, way: _Way, side: int) -> Row:
        kept = {name: torch.cat(values) for name, values in self.kept.items()}
        stage = way.file.stage
        detail = None
        if "our detail" in kept:
            detail = (kept["our detail"].mean() / kept["real detail"].mean()).item()
        return Row(
            stage.number, stage.size, way.who, way.settings.steps, way.evaluations,
            retrieval_accuracy(kept["made"], kept["real"], side),
            kept["error"].mean().sqrt().item(), kept["from first"].mean().sqrt().item(),
            kept["psnr"].mean().item(), kept["ssim"].mean().item(), detail,
        )  # fmt: skip


def tabulate(
    run: Path,
    steps: Sequence[int],
    *,
    num: int,
    split: Split | None,
    unet_limit: int | None,
    allow_unfinished: bool,
    runtime: RuntimeOptions,
    options: SamplingOptions,
    progress: Progress,
    say: Say,
) -> list[Row]:
    """Measures each stage of a run by itself, in several numbers of steps.

    Super-resolution enlarges real pictures, so that no stage's rows depend on another's. A stage
    that was distilled is shown in the steps that it learned, below its teacher with the guidance
    that became part of it.

    Args:
        run: The run's folder.
        steps: Of what was not distilled; the first are what the others are compared with.
        num: Captions used at most.
        split: As for `evaluate_run`, and so are the other arguments.
        unet_limit: See there.
        allow_unfinished: See there.
        runtime: See there.
        options: Guidance, sampler, spacing and seed.
        progress: See there.
        say: See there.
    """
    cascade = TrainedStages.load(
        run, runtime=runtime, unet_limit=unet_limit, allow_unfinished=allow_unfinished, say=say
    )
    config = cascade.files[0].config
    prepared = prepare(config, progress=progress)
    _, indices, _ = choose_pictures(config, prepared, split, say)
    indices = indices[:num]
    rows: list[Row] = []
    text, _ = encode(cascade.files, [prepared.source.captions[i] for i in indices],
                     device=cascade.device)  # fmt: skip
    side = config.imagen.image_sizes[0]
    for entry, file in enumerate(cascade.files):
        ways = list(_ways(file, entry, len(cascade.files), steps, options))
        tallies = [_Tally() for _ in ways]
        at_once = pictures_together(file.stage.size)
        for start in range(0, len(indices), at_once):
            progress(f"U-Net {file.unet_number}", start, len(indices))
            group = indices[start : start + at_once]
            part = slice(start, start + len(group))
            of_group = Text(text.embeds[part], text.mask[part])
            inputs, real = real_inputs(prepared, group, file.stage, of_group, options.seed + start)
            first = None
            for way, images in _made(ways, inputs, cascade):
                first = images if first is None else first
                tallies[way].add(images, real, first, file.stage.small_size, side)
        progress(f"U-Net {file.unet_number}", len(indices), len(indices))
        rows += [tally.row(way, side) for way, tally in zip(ways, tallies, strict=True)]
    return rows


def write_rows(run: Path, rows: Sequence[Row]) -> None:
    """Writes the rows into the run."""
    written = json.dumps(as_dicts(rows), indent=1) + "\n"
    write_atomically(
        steps_table_path(run), lambda temporary: temporary.write_text(written, encoding="utf-8")
    )


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Prints the table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("U-Net", "", "steps", "evaluations", "retrieval", "distance", "from first row",
                 "PSNR, dB", "SSIM", "detail"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("", "U-Net") else "right")
    for row in rows:
        table.add_row(
            f"{row.unet}, {row.size} px", row.who, str(row.steps), str(row.evaluations),
            f"{row.retrieval_accuracy:.1%}", f"{row.distance:.4f}", f"{row.from_first:.4f}",
            f"{row.psnr_db:.2f}", f"{row.ssim:.4f}",
            "" if row.detail is None else f"{row.detail:.2f}",
        )  # fmt: skip
    console.print(table)


def _ways(
    file: InferenceFile, entry: int, stages: int, steps: Sequence[int], options: SamplingOptions
) -> Iterator[_Way]:
    """Every way to sample a stage; the teacher's come before the student's."""
    few = file.stage.few_steps
    if few is None:
        for count in steps:
            _check_count(count, file.stage)
            taken = options.changed(steps=count)
            # Of all stages: a single guidance scale is the base's.
            yield _Way("itself", file, taken.for_stages([file.stage] * stages)[entry])
        return
    teacher = read_stage(expanded(few.teacher), file.unet_number, allow_unfinished=True)
    if teacher.stage.few_steps is None:
        for count in steps:
            _check_count(count, teacher.stage)
            taken = options.changed(steps=count, cond_scale=[few.cond_scale] * stages)
            yield _Way("teacher", teacher, taken.for_stages([teacher.stage] * stages)[entry])
    else:
        yield _Way("teacher", teacher, SamplingOptions().for_stages([teacher.stage])[0])
    yield _Way("student", file, SamplingOptions().for_stages([file.stage])[0])


def _check_count(steps: int, stage: StageConfig) -> None:
    if steps > stage.timesteps:
        raise UsageError(
            f"{option('steps_table')} {steps}: {stage.name} has {stage.timesteps} times "
            f"(imagen.timesteps); take at most so many."
        )


def _made(
    ways: Sequence[_Way], inputs: Inputs, cascade: TrainedStages
) -> Iterator[tuple[int, Tensor]]:
    """Number and pictures of each way, one network in memory at a time."""
    for _, of_file in groupby(enumerate(ways), lambda numbered: numbered[1].file.path):
        numbered = list(of_file)
        file = numbered[0][1].file
        caches = any(way.settings.caches for _, way in numbered)
        with closing(
            Stage(file, cascade.device, cascade.runtime, caches=caches, say=cascade.say)
        ) as stage:
            for i, way in numbered:
                yield i, stage.sample(inputs, way.settings)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of levels from 0 to 1, of each picture."""
    return ((a - b) / 2).square().flatten(1).mean(1)


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON can hold them."""
    return [row._asdict() for row in rows]
