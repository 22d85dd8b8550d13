"""What a second call costs besides its evaluations, with stages that stay loaded and without.

    python benchmarks/second_call.py runs/emoji_demo

One picture in 25 steps a stage: the first call of a process, the second of the same prompt, one of
another prompt, and what the networks' evaluations take of it. Processor time, so that other work on
the machine does not count.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
from report import machine, table

from imagen_scale.sampling.cascade import Cascade
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.stage import Stage
from imagen_scale.sampling.stages import TrainedStages

OPTIONS = SamplingOptions.make(steps=25, cond_scale=2.0)


def seconds_of(call: Callable[[], object]) -> float:
    """Processor time of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


@click.command(help=__doc__)
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
def main(run: Path, rounds: int) -> None:
    """See the module."""
    sampling = 0.0
    parts = Stage._sample_part

    def timed(*arguments: object, **options: object) -> object:
        nonlocal sampling
        start = time.process_time()
        made = parts(*arguments, **options)  # type: ignore[arg-type]
        sampling += time.process_time() - start
        return made

    Stage._sample_part = timed  # type: ignore[method-assign,assignment]
    cascade = Cascade.load(run, runtime="torch")
    first = seconds_of(lambda: cascade.sample("sun", OPTIONS))

    def besides(call: Callable[[int], object]) -> tuple[float, float]:
        nonlocal sampling
        whole, own = [], []
        for number in range(rounds):
            sampling = 0.0
            whole.append(seconds_of(partial(call, number)))
            own.append(whole[-1] - sampling)
        return statistics.median(whole), statistics.median(own)

    fresh = TrainedStages.load(run)
    rows = [
        ("freed after each call, as `imagen-scale sample` does",
         besides(lambda number: list(fresh.stream(["sun"], OPTIONS)))),
        ("stay loaded, the same prompt", besides(lambda number: cascade.sample("sun", OPTIONS))),
        ("stay loaded, another prompt",
         besides(lambda number: cascade.sample(f"sun {number}", OPTIONS))),
    ]  # fmt: skip
    columns = ("stages", "a call, CPU s", "besides evaluations, CPU s")
    click.echo(table(columns, [[name, f"{a:.2f}", f"{b:.3f}"] for name, (a, b) in rows]))
    click.echo(f"\nFirst call of the process: {first:.2f} CPU s. {rounds} calls each, medians; "
               f"{machine('torch')}")  # fmt: skip


if __name__ == "__main__":
    main()
