"""What deep features taken again save in time and cost in quality, on a trained stage.

\b
    python benchmarks/cache_interval.py --run runs/emoji_demo
    python benchmarks/cache_interval.py --write docs/sampling.md

Samples each stage at each `--cache-interval` and, beside them, in fewer steps of which each is
whole: super-resolution from real pictures made small, all from the same noise. Each row is compared
with the first one's pictures and with the real ones. Times are the process's on the CPU, of all
pictures together, the rows in turn, round after round; medians, and the median of each round's
ratio to the first row.
"""  # noqa: D301 - click reads the backspace

import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import click
import torch
from report import machine, publish, table, write_option
from torch import Tensor

from imagen_scale.data.prepared import prepare
from imagen_scale.data.sequence import split_indices
from imagen_scale.diffusion.lowres import shrink_and_enlarge
from imagen_scale.diffusion.names import Sampler
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.measures import psnr_db, ssim
from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.sampling.prompts import encode
from imagen_scale.sampling.real_inputs import real_inputs
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stages import TrainedStages

MARK = "cache_interval"
COLUMNS = ("sampler", "steps", "interval", "whole evaluations", "CPU time",
           "times faster", "PSNR to the first row, dB", "PSNR to the real picture, dB", "SSIM",
           "detail")  # fmt: skip


class Row(NamedTuple):
    """One way to sample."""

    sampler: Sampler
    steps: int
    interval: int


ROWS = (
    *(Row("dpmpp_2m", 25, interval) for interval in (1, 2, 3, 5)),
    *(Row("dpmpp_2m", steps, 1) for steps in (15, 12, 10)),
    *(Row("ddpm", 25, interval) for interval in (1, 2, 3)),
)


@click.command(help=__doc__)
@click.option("--run", type=click.Path(exists=True, file_okay=False, path_type=Path),
              default="runs/emoji_demo", show_default=True, help="A trained cascade.")  # fmt: skip
@click.option("--cond-scale", type=float, default=2.0, show_default=True, help="Of the base stage.")
@click.option("--captions", "count", type=click.IntRange(min=1), default=48, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--runtime", type=click.Choice(["torch", "onnx", "openvino"]), default="torch",
              show_default=True, help="An export needs `imagen-scale export --cache`.")  # fmt: skip
@write_option(MARK)
def main(
    run: Path, cond_scale: float, count: int, rounds: int, runtime: str, write: Path | None
) -> None:
    """Measures, prints and writes."""
    how = RuntimeOptions.make(runtime=runtime, precision="fp32")
    cascade = TrainedStages.load(run, runtime=how)
    text = "\n\n".join([
        *(measure(cascade, file, cond_scale, count, rounds) for file in cascade.files),
        f"{count} captions, {rounds} rounds; guidance {cond_scale:g}, and 1 above the base stage; "
        f"fp32 in {runtime}, {torch.get_num_threads()} threads; {machine('torch')}",
    ])  # fmt: skip
    publish(text, write, MARK)


def measure(
    cascade: TrainedStages, file: InferenceFile, cond_scale: float, count: int, rounds: int
) -> str:
    """A stage's table."""
    prepared = prepare(file.config)
    indices = split_indices(prepared.source.keys, 0.0)[0][:count]
    captions = [prepared.source.captions[i] for i in indices]
    text, _ = encode([file], captions, device=cascade.device)
    inputs, real = real_inputs(prepared, indices, file.stage, text, 0)

    def settings_of(row: Row) -> StageSettings:
        options = SamplingOptions(
            sampler=row.sampler, steps=row.steps, cache_interval=row.interval, cond_scale=cond_scale
        )
        return options.for_stages(cascade.configs)[cascade.files.index(file)]

    seconds: dict[Row, list[float]] = {row: [] for row in ROWS}
    made: dict[Row, Tensor] = {}
    with closing(cascade.stage(file.unet_number)) as stage:
        for interval in (1, 2):  # what is opened or chosen at first use is not counted
            stage.sample(inputs, settings_of(Row("ddim", 2, interval)))
        for number in range(rounds):
            for row in ROWS:
                start = time.process_time()
                made[row] = stage.sample(inputs, settings_of(row))
                seconds[row].append(time.process_time() - start)
            click.echo(f"U-Net {file.unet_number}: round {number + 1} of {rounds}", err=True)
    small, first = file.stage.small_size, seconds[ROWS[0]]
    lines = [line(row, made, real, small, first, seconds[row]) for row in ROWS]
    title = f"U-Net {file.unet_number}, {file.stage.size} px, trained for {file.step} steps:"
    return f"{title}\n\n{table(COLUMNS, lines)}"


def line(
    row: Row,
    made: dict[Row, Tensor],
    real: Tensor,
    small: int | None,
    first: list[float],
    seconds: list[float],
) -> list[str]:
    """A row of the table."""
    images, reference = made[row], made[ROWS[0]]
    ratio = statistics.median(a / b for a, b in zip(first, seconds, strict=True))
    detail = ""
    if small is not None:
        ours, theirs = ((one - shrink_and_enlarge(one, small)).square().mean() for one in (
            images, real,
        ))  # fmt: skip
        detail = f"{(ours / theirs).item():.3f}"
    same = "" if row == ROWS[0] else f"{psnr_db(images, reference).mean().item():.1f}"
    return [
        row.sampler, str(row.steps), str(row.interval), str(-(-row.steps // row.interval)),
        f"{statistics.median(seconds):.2f} s", f"{ratio:.2f}", same,
        f"{psnr_db(images, real).mean().item():.2f}", f"{ssim(images, real).mean().item():.4f}",
        detail,
    ]  # fmt: skip


if __name__ == "__main__":
    main()
