"""What dynamic thresholding does to colours, on captions that were held out.

\b
    python benchmarks/quality.py --seeds 1 --steps 500 --only modern
    python benchmarks/thresholding.py runs/quality/4_0 --write docs/sampling.md

Measures the base stage of a run that has held-out pictures and cuts values off
(imagen.dynamic_thresholding_percentile null), as it is and by percentiles, at several guidances.
The run's evaluation.json is the last one's then.
"""  # noqa: D301 - click reads the backspace

from pathlib import Path

import click
from guidance_interval import MEASURES, cells, measured, of_base
from report import machine, publish, table, write_option

MARK = "thresholding"
GUIDANCES = (2.0, 3.0)
PERCENTILES = (None, 0.95, 0.995)
COLUMNS = ("guidance", "percentile", *MEASURES)


@click.command(help=__doc__)
@of_base
@write_option(MARK)
def main(run: Path, num: int, steps: int, write: Path | None) -> None:
    """See the module."""
    rows = []
    for guidance in GUIDANCES:
        for percentile in PERCENTILES:
            words = ["--cond-scale", str(guidance)]
            if percentile is not None:
                words += ["--threshold", str(percentile)]
            captions, stage = measured(run, num, steps, words)
            way = "cut off" if percentile is None else f"{percentile:g}"
            rows.append([f"{guidance:g}", way, *cells(stage)])
            click.echo(" | ".join(rows[-1]), err=True)
    text = (
        f"{table(COLUMNS, rows)}\n\n{captions} held-out captions, base stage, {steps} steps; "
        f"chance of retrieval {1 / captions:.1%}. {machine('torch')}"
    )
    publish(text, write, MARK)


if __name__ == "__main__":
    main()
