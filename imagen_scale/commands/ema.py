"""`imagen-scale ema`."""

import json
from typing import Any

import click

from imagen_scale.commands.console import Progress, open_console, say
from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.options import Number, named_here
from imagen_scale.errors import UsageError


@click.command(short_help="Choose the average of the weights after training.")
@click.argument("run", required=False)
@click.option(
    "--unet", type=click.IntRange(min=1), default=1, show_default=True, help="Of the run."
)
@click.option("--width", type=Number(min=0, min_open=True, max=0.25),
              help="Sample from the average of this share of the training.")  # fmt: skip
@click.option("--pick", is_flag=True, help="Measure several widths and sample from the best.")
@click.option("--best", "take_best", is_flag=True,
              help="Sample from the best validation, which training.keep_best kept.")  # fmt: skip
@click.option("--restore", is_flag=True, help="Sample from training's own average again.")
@click.option("--num", type=click.IntRange(min=2), default=256, show_default=True,
              help="Pictures measured on.")  # fmt: skip
@click.option("--features", help="Pick by KID on this network (see `evaluate`), which samples.")
@click.option("--steps", type=click.IntRange(min=1),
              help="Sampling steps for KID; default 25, or all that there are.")  # fmt: skip
@click.option("--cond-scale", type=Number(), help="Guidance for KID; default 2.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@user_errors
def ema(
    run: str | None,
    unet: int,
    width: float | None,
    pick: bool,
    take_best: bool,
    restore: bool,
    num: int,
    features: str | None,
    steps: int | None,
    cond_scale: float | None,
    as_json: bool,
) -> None:
    """Choose the average of the weights of a U-Net of RUN (default the newest under runs/).

    Needs a training with training.ema_widths, whose snapshots make the average over any share of
    the training; --best needs one with training.keep_best. Alone it measures several widths;
    nothing is changed.

    \b
        imagen-scale ema runs/birds --unet 1            # a table of widths
        imagen-scale ema runs/birds --unet 1 --pick     # and sample from the best
        imagen-scale ema runs/birds --unet 1 --width 0.08
        imagen-scale ema runs/birds --unet 1 --best     # of the validations
    """
    if sum((width is not None, pick, take_best, restore)) > 1:
        raise UsageError("--width, --pick, --best and --restore: give one of them.")
    of_measuring = named_here("num", "features", "steps", "cond_scale", "as_json")
    if of_measuring and (width is not None or take_best or restore):
        raise UsageError(
            f"--{of_measuring[0].removeprefix('as_').replace('_', '-')}: goes with measuring, "
            f"alone or with --pick; leave it out."
        )
    if features is None and (of_kid := named_here("steps", "cond_scale")):
        raise UsageError(
            f"--{of_kid[0].replace('_', '-')}: is of drawing pictures, for KID; give --features, "
            f"e.g. efficientnet-lite0, too, or leave it out."
        )
    from imagen_scale.config import load_config
    from imagen_scale.runs import averages
    from imagen_scale.runs.folders import config_path, find_run

    run_dir = find_run(run)
    load_config(config_path(run_dir)).check_number(unet, "unet")
    if restore:
        done = averages.restore(run_dir, unet)
        what = "samples from" if done else "already sampled from"
        click.echo(f"U-Net {unet} {what} training's own average")
        return
    if take_best:
        found = averages.install_best(run_dir, unet)
        click.echo(
            f"U-Net {unet} samples from the average of step {found['step']}, where "
            f"{found['measure']} was least ({found['value']:.5g}); --restore undoes it"
        )
        return
    if width is None:
        from imagen_scale.evaluation.averages import best, measure_averages
        from imagen_scale.sampling.options import SamplingOptions

        asked = {"steps": steps, "cond_scale": cond_scale}
        given = {name: value for name, value in asked.items() if value is not None}
        with Progress() as progress:
            measured = measure_averages(
                run_dir, unet, num=num, features=features,
                options=SamplingOptions.make(**given),
                progress=progress, say=say,
            )  # fmt: skip
        _show(measured, as_json)
        if not pick:
            return
        width = best(measured).width
        if width is None:
            averages.restore(run_dir, unet)
            click.echo(
                f"U-Net {unet}: training's own average is the best; it is sampled from", err=as_json
            )
            return
    averages.install(run_dir, unet, width)
    click.echo(
        f"U-Net {unet} samples from the average of width {width:g}; --restore undoes it",
        err=as_json,
    )


def _show(found: list[Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([one._asdict() for one in found], indent=1))
        return
    from rich.table import Table

    table = Table("width", box=None, pad_edge=False, header_style="bold")
    if found[0].x_0_error is not None:
        table.add_column("error of the predicted picture", justify="right")
    if found[0].kid is not None:
        table.add_column("KID x 1000", justify="right")
    for one in found:
        name = "training's own" if one.width is None else f"{one.width:g}"
        error = [] if one.x_0_error is None else [f"{one.x_0_error:.5f}"]
        kid = [] if one.kid is None else [f"{1000 * one.kid:.2f}"]
        table.add_row(name, *error, *kid)
    open_console().print(table)
