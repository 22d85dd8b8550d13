"""`imagen-scale sheet`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from imagen_scale.commands.console import Progress, say
from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.options import run_option, unet_limit_option, unfinished_option
from imagen_scale.commands.terminal import Prompt
from imagen_scale.errors import UsageError
from imagen_scale.sampling.sheet import VARIED, plan_sheet, positions, title, values_of


def _varied(command: Callable[..., None]) -> Callable[..., None]:
    """Every option that a sheet can vary."""
    for facts in reversed(VARIED):
        flag = "--" + facts.name.replace("_", "-")
        command = click.option(flag, facts.name, type=Prompt(), help=facts.sentence)(command)
    return command


@click.command(short_help="One sheet of pictures over one or two options.")
@click.argument("prompts", nargs=-1, type=Prompt())
@run_option
@click.option("--out", type=click.Path(path_type=Path), help="PNG file; default samples/sheet_N.")
@unet_limit_option
@unfinished_option
@_varied
@user_errors
def sheet(
    prompts: tuple[str, ...],
    run: str | None,
    out: Path | None,
    unet_limit: int | None,
    allow_unfinished: bool,
    **given: str | None,
) -> None:
    """Make one captioned sheet of PROMPTS over any one or two options, all else equal.

    Commas separate the values that are compared, slashes those of the stages (steps 25/10,50/20).
    Several prompts are a side of the sheet, too. A JSON file with the settings lies beside it.

    \b
        imagen-scale sheet "red heart" --cond-scale 0.1,3,5 --steps 10,25
        imagen-scale sheet "red heart" "sun" --sampler ddim,dpmpp_2m
        imagen-scale sheet "red heart" --runtime torch,onnx
    """
    if not prompts:
        raise UsageError("no prompt: give one or more in quotes.")
    varied = {
        facts.name: values_of(facts, text)
        for facts in VARIED
        if (text := given[facts.name]) is not None
    }
    plan = plan_sheet(prompts, varied)
    if out is not None and (out.suffix.lower() != ".png" or out.exists()):
        raise UsageError(f"--out {out}: name a PNG file that is not there yet.")
    from imagen_scale.files.atomic import sha256
    from imagen_scale.files.pictures import save_picture, taken_number, to_uint8
    from imagen_scale.files.sheets import draw_sheet
    from imagen_scale.runs.folders import find_run, samples_dir
    from imagen_scale.sampling.stages import TrainedStages
    from imagen_scale.version import __version__

    run_dir = find_run(run)
    pictures: list[list[Any]] = [[] for _ in plan.cells]
    facts: list[list[Any]] = [[] for _ in plan.cells]
    # Every cell is looked at before the first is drawn.
    cascades = {
        cell.runtime: TrainedStages.load(
            run_dir, runtime=cell.runtime, unet_limit=unet_limit,
            allow_unfinished=allow_unfinished, say=say,
        )
        for line in plan.cells for cell in line
    }  # fmt: skip
    for line in plan.cells:
        for cell in line:
            cascades[cell.runtime].settings(cell.options)
    with Progress() as progress:
        for done, (row, column) in enumerate(positions(plan)):
            progress("pictures", done, len(positions(plan)))
            cell = plan.cells[row][column]
            cascade = cascades[cell.runtime]
            (made,) = cascade.stream([cell.prompt], cell.options)
            pictures[row].append(to_uint8(made.stages[-1][None])[0])
            settings = [one.model_dump() for one in cascade.settings(cell.options)]
            facts[row].append(
                {"prompt": cell.prompt, "seed": made.seed, "runtimes": made.runtimes,
                 "negative_prompt": cell.options.negative_prompt, "tile": cell.options.tile,
                 "not_read": [lost._asdict() for lost in made.not_read], "stages": settings}
            )  # fmt: skip
    drawn = draw_sheet(
        pictures, columns=plan.columns.captions, rows=plan.rows.captions if plan.rows else [""],
        title=title(plan, varied),
    )  # fmt: skip
    told = {
        "columns": plan.columns._asdict(), "rows": plan.rows and plan.rows._asdict(),
        "pictures": facts, "version": __version__,
        "model_sha256": [sha256(file.path) for file in next(iter(cascades.values())).files],
    }  # fmt: skip
    if out is None:
        folder = samples_dir(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with taken_number(folder) as number:
            out = folder / f"sheet_{number:05d}.png"
            save_picture(out, drawn, told)
    else:
        save_picture(out, drawn, told)
    click.echo(f"{len(positions(plan))} pictures in {out}")
