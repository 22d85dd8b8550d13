"""The pictures of a sheet, each as `sample` makes it, with what it was made from."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from imagen_scale.errors import UsageError, option
from imagen_scale.files.atomic import sha256
from imagen_scale.files.numbers import taken_number
from imagen_scale.files.picture_files import save_new_picture, save_picture
from imagen_scale.files.pictures import to_uint8
from imagen_scale.files.sheets import draw_sheet
from imagen_scale.runs.checkpoint_average import averaged_at, check_step
from imagen_scale.runs.folders import samples_dir
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.residents import Residents
from imagen_scale.sampling.runtimes.contract import Say
from imagen_scale.sampling.sheet import CHECKPOINT, Cell, Plan, positions
from imagen_scale.sampling.stage import default_device
from imagen_scale.sampling.stages import Remembered, TrainedStages, once
from imagen_scale.version import __version__


class Source(NamedTuple):
    """The run that a sheet is drawn by."""

    run: Path
    unet_limit: int | None = None
    allow_unfinished: bool = False


class _Weights(NamedTuple):
    """What draws some of the pictures."""

    files: list[InferenceFile]
    residents: Residents  # stays loaded from one to the next


def draw(
    plan: Plan,
    source: Source,
    *,
    say: Say = lambda sentence: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[list[Any]], dict[str, Any]]:
    """Draws every picture of a sheet.

    All are looked at before the first is drawn. A prompt is encoded once, and of checkpoints one
    is on disk as a file to sample from at a time.

    Args:
        plan: What is drawn where.
        source: By which run.
        say: As for `TrainedStages`.
        progress: Told pictures done and in all; what it raises ends the drawing.

    Returns:
        By row, then by column: (H, W, 3) uint8; and the facts about all of it, for JSON.

    Raises:
        CheckpointError: If a stage or a checkpoint is missing or damaged.
        UsageError: Naming the option that is wrong.
    """
    say, remembered = once(say), Remembered()
    files = TrainedStages.load(
        source.run, unet_limit=source.unet_limit, allow_unfinished=source.allow_unfinished
    ).files
    _check(plan, source.run, files, say)
    pictures: list[list[Any]] = [[None] * len(line) for line in plan.cells]
    facts: list[list[Any]] = [[None] * len(line) for line in plan.cells]
    for done, (row, column, weights) in enumerate(_by_checkpoint(plan, source.run, files)):
        progress(done, len(positions(plan)))
        cell = plan.cells[row][column]
        cascade = TrainedStages(
            weights.files, None, cell.runtime, say=say, remembered=remembered,
            residents=weights.residents,
        )  # fmt: skip
        (made,) = cascade.stream([cell.prompt], cell.options)
        pictures[row][column] = to_uint8(made.stages[-1][None])[0]
        settings = [one.model_dump() for one in cascade.settings(cell.options)]
        facts[row][column] = {
            "prompt": cell.prompt, "seed": made.seed, "runtimes": made.runtimes,
            "negative_prompt": cell.options.negative_prompt, "tile": cell.options.tile,
            "checkpoint": cell.checkpoint,
            "not_read": [lost._asdict() for lost in made.not_read], "stages": settings,
        }  # fmt: skip
    return pictures, {
        "columns": plan.columns._asdict(), "rows": plan.rows and plan.rows._asdict(),
        "pictures": facts, "version": __version__,
        "model_sha256": [sha256(file.path) for file in files],
    }  # fmt: skip


def write(
    plan: Plan, pictures: list[list[Any]], facts: dict[str, Any], run: Path, *,
    title: str, out: Path | None = None,
) -> Path:  # fmt: skip
    """Writes a sheet and, beside it, its facts.

    Args:
        plan: See `draw`.
        pictures: Of `draw`.
        facts: Of `draw`.
        run: The run's folder.
        title: What all pictures have in common.
        out: The PNG file; None takes the next number in the run's samples.

    Returns:
        The PNG file.
    """
    drawn = draw_sheet(
        pictures, columns=plan.columns.captions, rows=plan.rows.captions if plan.rows else [""],
        title=title,
    )  # fmt: skip
    if out is not None:
        return save_new_picture(out, drawn, facts)
    folder = samples_dir(run)
    folder.mkdir(parents=True, exist_ok=True)
    with taken_number(folder) as number:
        out = folder / f"sheet_{number:05d}.png"
        save_picture(out, drawn, facts)
    return out


def _check(plan: Plan, run: Path, files: list[InferenceFile], say: Say) -> None:
    for line in plan.cells:
        for cell in line:
            TrainedStages(files, None, cell.runtime, say=say).settings(cell.options)
            if isinstance(cell.checkpoint, list) and len(cell.checkpoint) != len(files):
                raise UsageError(
                    f"{option(CHECKPOINT.name)}: {len(cell.checkpoint)} values for {len(files)} "
                    f"stage(s). Give one per stage, or a single one."
                )
            for unet, step in cell.steps.items():
                check_step(run, unet, step)


def _by_checkpoint(
    plan: Plan, run: Path, files: list[InferenceFile]
) -> Iterator[tuple[int, int, _Weights]]:
    """Row, column and weights of every picture; those of the same weights follow each other."""
    groups: dict[tuple[tuple[int, int], ...], list[tuple[int, int]]] = {}
    for row, column in positions(plan):
        cell: Cell = plan.cells[row][column]
        groups.setdefault(tuple(cell.steps.items()), []).append((row, column))
    for steps, places in groups.items():
        with ExitStack() as opened:
            of_stage = dict(steps)
            chosen = [
                opened.enter_context(averaged_at(run, file, of_stage[file.unet_number]))
                if file.unet_number in of_stage
                else file
                for file in files
            ]
            residents = Residents(default_device())
            opened.callback(residents.close)
            for row, column in places:
                yield row, column, _Weights(chosen, residents)
