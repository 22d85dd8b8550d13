"""What guidance in an interval of the steps costs and keeps, on captions that were held out.

\b
    python benchmarks/quality.py --seeds 1 --steps 500 --only modern
    python benchmarks/guidance_interval.py runs/quality/4_0 --write docs/sampling.md

Measures the base stage of a run that has held-out pictures by `imagen-scale evaluate`, once for
each interval, with the same captions and seeds. The run's evaluation.json is the last one's then.
"""  # noqa: D301 - click reads the backspace

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from evaluated import evaluated
from report import machine, publish, table, write_option

from imagen_scale.diffusion.guidance import guided_times
from imagen_scale.diffusion.spacing import spaced_times

MARK = "guidance-interval"
# The last row is guidance in no step.
INTERVALS = ("0:1", "0.2:1", "0.4:1", "0:0.8", "0:0.6", "0.2:0.8", None)
MEASURES = ("KID x 1000", "retrieval", "drift of colours, of 255", "of their spread")
COLUMNS = ("guidance in", "evaluations a picture", *MEASURES)


OPTIONS = (
    click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path)),
    click.option("--num", type=click.IntRange(min=2), default=128, show_default=True,
                 help="Held-out captions."),
    click.option("--steps", type=click.IntRange(min=1), default=25, show_default=True),
)  # fmt: skip


def of_base(command: Callable[..., None]) -> Callable[..., None]:
    """The options of what measures the base stage of a run."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.command(help=__doc__)
@of_base
@click.option("--cond-scale", type=float, default=2.0, show_default=True)
@write_option(MARK)
def main(run: Path, num: int, steps: int, cond_scale: float, write: Path | None) -> None:
    """See the module."""
    rows = []
    for interval in INTERVALS:
        words = ["--cond-scale", "1"]
        if interval is not None:
            words = ["--cond-scale", str(cond_scale), "--guidance-interval", interval]
        captions, stage = measured(run, num, steps, words)
        # An interval counts in shares of the steps, wherever their times are.
        guided = 0 if interval is None else len(guided_times(spaced_times(steps, steps), interval))
        where = "no step" if interval is None else interval
        rows.append([where, str(steps + guided), *cells(stage)])
        click.echo(" | ".join(rows[-1]), err=True)
    text = (
        f"{table(COLUMNS, rows)}\n\n{captions} held-out captions, base stage, {steps} steps, "
        f"guidance {cond_scale:g}; chance of retrieval {1 / captions:.1%}. {machine('torch')}"
    )
    publish(text, write, MARK)


def measured(run: Path, num: int, steps: int, words: list[str]) -> tuple[int, dict[str, Any]]:
    """How many captions there were, and what was found of the base stage."""
    facts = evaluated(run, num, steps, "--unet-limit", "1", "--split", "held-out", *words)
    return facts["captions"], facts["stages"][0]


def cells(stage: dict[str, Any]) -> list[str]:
    """The columns of `MEASURES`."""
    return [
        f"{1000 * stage['kid']:.0f}", f"{stage['retrieval_accuracy']:.0%}",
        f"{255 * stage['colour_mean_drift']:+.1f}", f"{255 * stage['colour_std_drift']:+.1f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
