"""`imagen-scale sheet`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from imagen_scale.commands.console import Progress, say
from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.options import run_option, unet_limit_option, unfinished_option
from imagen_scale.commands.terminal import Prompt
from imagen_scale.errors import UsageError
from imagen_scale.files.places import check_place
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
        imagen-scale sheet "red heart" --checkpoint 500,1000,last
    """
    if not prompts:
        raise UsageError("no prompt: give one or more in quotes.")
    if out is not None:
        if out.suffix.lower() != ".png" or out.exists():
            raise UsageError(f"--out {out}: name a PNG file that is not there yet.")
        check_place(out)
    from imagen_scale.runs.checkpoint_average import kept_steps
    from imagen_scale.runs.folders import find_run
    from imagen_scale.sampling.sheet_drawing import Source, draw, write

    run_dir = find_run(run)
    varied = {
        facts.name: values_of(facts, text, partial(kept_steps, run_dir))
        for facts in VARIED
        if (text := given[facts.name]) is not None
    }
    plan = plan_sheet(prompts, varied)
    with Progress() as progress:
        pictures, facts = draw(
            plan, Source(run_dir, unet_limit, allow_unfinished), say=say,
            progress=partial(progress, "pictures"),
        )  # fmt: skip
    path = write(plan, pictures, facts, run_dir, title=title(plan, varied), out=out)
    click.echo(f"{len(positions(plan))} pictures in {path}")
