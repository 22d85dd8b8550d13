"""`imagen-scale evaluate`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from imagen_scale.commands.console import Progress, open_console, say
from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.options import (
    run_option,
    sampling_options,
    unet_limit_option,
    unfinished_option,
    whole_number,
)
from imagen_scale.errors import DiskProblem, UsageError, of_system
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.options import RuntimeOptions


@click.command(short_help="Measure a trained run.")
@run_option
@click.option(
    "--num",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Captions used at most.",
)
@click.option(
    "--split",
    type=click.Choice(["held-out", "train"]),
    help="Which pictures; default held-out where there are any.",
)
@click.option("--features", help="Network for FID and KID: see above.")
@click.option("--clip", help="CLIP model for the CLIP score: a folder, or a name on the hub.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True,
              help="Draw some captions from so many seeds each, to see them vary.")  # fmt: skip
@click.option(
    "--steps-table",
    is_flag=False,
    flag_value="25,8,4,2,1",
    metavar="[N,...]",
    help="Instead, tell what fewer steps cost: each stage by itself in so many, a student below "
    "its teacher. Default 25,8,4,2,1.",
)
@unet_limit_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@unfinished_option
@user_errors
@sampling_options("num", "negative_prompt", "tile", "at_once")
def evaluate(
    run: str | None,
    num: int,
    split: Any,
    features: str | None,
    clip: str | None,
    seeds: int,
    steps_table: str | None,
    unet_limit: int | None,
    as_json: bool,
    allow_unfinished: bool,
    options: SamplingOptions,
    runtime: RuntimeOptions,
) -> None:
    """Measure a trained run on captions of its data; writes evaluation.json into the run.

    Retrieval, colours (those that captions name, too), faithfulness to the low-resolution
    picture, and PSNR and SSIM against bicubic need nothing else. --seeds tells how much pictures of
    one caption vary. --features adds FID and KID: a vision model of transformers (folder or name,
    e.g. facebook/dinov2-base), `efficientnet-lite0`, which needs no download, `inception`, or the
    path of Inception's weights. --clip adds the CLIP score.

    \b
        imagen-scale evaluate --num 64
        imagen-scale evaluate --steps-table --cond-scale 2
        imagen-scale evaluate --num 1000 --features models/dinov2-base --clip models/clip
    """
    from imagen_scale.runs.folders import find_run

    run_dir = find_run(run)
    if steps_table is not None:
        asked = {"features": features, "clip": clip, "seeds": seeds > 1}
        if extra := [f"--{name}" for name, value in asked.items() if value]:
            raise UsageError(
                f"--steps-table measures distances to real pictures only; leave "
                f"{' and '.join(extra)} out."
            )
        _tabulate(
            run_dir, steps_table, as_json=as_json, num=num, split=split, unet_limit=unet_limit,
            allow_unfinished=allow_unfinished, runtime=runtime, options=options,
        )  # fmt: skip
        return
    from imagen_scale.evaluation.report import print_table
    from imagen_scale.evaluation.run import evaluate_run

    with Progress() as progress:
        report = evaluate_run(
            run_dir, num=num, split=split, features=features, clip=clip, num_seeds=seeds,
            unet_limit=unet_limit, allow_unfinished=allow_unfinished,
            runtime=runtime, options=options, progress=progress, say=say,
        )  # fmt: skip
    # First of all shown: the disk may be full.
    if as_json:
        click.echo(json.dumps(report.facts, indent=1))
    else:
        click.echo(f"{report.facts['captions']} captions, {report.facts['split']} pictures")
        print_table(report.facts, open_console())
    _keep(report.write)
    if not as_json:
        click.echo(f"written to {report.file}")


def _tabulate(run_dir: Path, steps: str, *, as_json: bool, **how: Any) -> None:
    counts = [whole_number(part.strip()) for part in steps.split(",")]
    if min(counts) < 1:
        raise UsageError(
            f"--steps-table {steps[:40]}: give whole numbers from 1 on, e.g. 25,8,4,2,1."
        )
    if "steps" in how["options"].model_fields_set:
        raise UsageError("--steps-table says in how many steps; leave --steps out.")
    from imagen_scale.evaluation.steps_table import as_dicts, print_rows, tabulate, write_rows

    with Progress() as progress:
        rows = tabulate(run_dir, counts, progress=progress, say=say, **how)
    if as_json:
        click.echo(json.dumps(as_dicts(rows), indent=1))
    else:
        print_rows(rows, open_console())
    _keep(lambda: write_rows(run_dir, rows))


def _keep(write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise DiskProblem(
            f"{of_system(error)}. What was measured stands above and is written nowhere: copy it, "
            f"or make room there and measure again."
        ) from None
