"""`imagen-scale evaluate`."""

import json
from typing import Any

import click

from imagen_scale.commands.console import Progress, open_console, say
from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.options import (
    run_option,
    sampling_options,
    unet_limit_option,
    unfinished_option,
)
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
    unet_limit: int | None,
    as_json: bool,
    allow_unfinished: bool,
    options: SamplingOptions,
    runtime: RuntimeOptions,
) -> None:
    """Measure a trained run on captions of its data; writes evaluation.json into the run.

    Retrieval, colours, faithfulness to the low-resolution picture, and PSNR and SSIM against
    bicubic need nothing else. --features adds FID and KID: a vision model of transformers (folder
    or name, e.g. facebook/dinov2-base), `efficientnet-lite0`, which needs no download, `inception`,
    or the path of Inception's weights. --clip
    adds the CLIP score.

    \b
        imagen-scale evaluate --num 64
        imagen-scale evaluate --num 1000 --features models/dinov2-base --clip models/clip
    """
    from imagen_scale.runs.folders import find_run

    run_dir = find_run(run)
    from imagen_scale.evaluation.report import print_table
    from imagen_scale.evaluation.run import evaluate_run

    with Progress() as progress:
        report = evaluate_run(
            run_dir, num=num, split=split, features=features, clip=clip,
            unet_limit=unet_limit, allow_unfinished=allow_unfinished,
            runtime=runtime, options=options, progress=progress, say=say,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(report.facts, indent=1))
        return
    click.echo(f"{report.facts['captions']} captions, {report.facts['split']} pictures")
    print_table(report.result, open_console())
    click.echo(f"written to {report.file}")
