"""Trains both stages of configs/cascade_64_256.json on CPU ranks: memory predicted and measured.

\b
    python benchmarks/cpu_memory.py                           both stages, ZeRO-2 and ZeRO-3
    python benchmarks/cpu_memory.py --unet 2 --batch 4        one stage, a smaller step
    python benchmarks/cpu_memory.py --write docs/memory.md    into the document, between marks

The real launcher, network, optimizer and offload; emoji and their text encoder instead of a data
set that has to be downloaded. Without a card all of it lies in host memory: up to 20 GB are needed.
Exits with 1 if a training fails or needs over 10 % more or less than was predicted.
"""  # noqa: D301 - click reads the backspace

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import click
from report import machine, publish, table, write_option

from imagen_scale.config import load_config

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "cascade_64_256.json"
MARK = "cpu_memory"
STEPS, MICRO_BATCH, TOLERANCE = 2, 4, 0.1
ON_HOST = {"device": "cpu"}
WAYS = (
    (1, {"stage": 2, "offload_optimizer": ON_HOST}),
    (2, {"stage": 3, "offload_optimizer": ON_HOST, "offload_param": ON_HOST}),
)
COLUMNS = ("stage", "pixels", "processes", "global batch = micro-batch x accumulation x processes",
           "loss of each step", "predicted for a process", "measured", "ratio")  # fmt: skip
CHECK = re.compile(r"plan check, U-Net \d: (.+) predicted, (.+) measured, ratio ([\d.]+)")


class Trained(NamedTuple):
    """One training."""

    row: list[str]
    ratio: float  # of measured and predicted memory


def settings(ranks: int, zero: dict[str, object], batch: int) -> dict[str, object]:
    """What is changed in the configuration: data that is at hand, and few steps."""
    return {
        "data.source": "emoji", "data.path": None, "text.encoder": "minilm",
        "data.names": ["red heart", "sun", "pizza", "rocket", "key", "house", "tent", "drum"],
        "data.val_fraction": 0, "data.num_workers": 0,
        "training.steps": STEPS, "training.warmup_steps": 0, "training.global_batch": batch,
        "training.micro_batch": min(MICRO_BATCH, batch // ranks), "training.sample_every": None,
        "training.checkpoint_every": 1000, "logging.log_every": 1,
        "memory.budget": "12GB",
        "deepspeed.zero_optimization": zero,
    }  # fmt: skip


def train(number: int, ranks: int, zero: dict[str, object], batch: int) -> Trained:
    """Trains one stage for some steps.

    Raises:
        click.ClickException: If the training fails; its last words are in it.
    """
    changed = settings(ranks, zero, batch)
    with tempfile.TemporaryDirectory() as folder:
        command = ["deepspeed", "--num_accelerators", str(ranks), "launch/train.py"]
        command += ["--config", str(CONFIG), "--unet", str(number), "--run", f"{folder}/run"]
        command += [f"--set={key}={json.dumps(value)}" for key, value in changed.items()]
        command += ["--plan-check", str(STEPS)]
        click.echo(f"U-Net {number}, {ranks} x ZeRO-{zero['stage']}", err=True)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        check = CHECK.search(done.stdout)
        if done.returncode or check is None:
            raise click.ClickException(f"it failed: {(done.stdout + done.stderr)[-3000:]}")
        lines = Path(folder, "run", f"unet{number}", "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    micro = changed["training.micro_batch"]
    return Trained(
        [
            f"U-Net {number}",
            str(load_config(CONFIG).imagen.image_sizes[number - 1]),
            f"{ranks}, ZeRO-{zero['stage']}, "
            f"{'optimizer' if 'offload_param' not in zero else 'optimizer and weights'} offloaded",
            f"{batch} = {micro} x {batch // ranks // micro} x {ranks}",
            ", ".join(f"{loss:.4f}" for loss in losses),
            check[1],
            check[2],
            check[3],
        ],
        float(check[3]),
    )


@click.command(help=__doc__)
@click.option("--unet", "unets", type=click.IntRange(1, 2), multiple=True, default=(1, 2))
@click.option("--batch", type=click.IntRange(min=2), default=8, show_default=True, help="Global.")
@write_option(MARK)
def main(unets: tuple[int, ...], batch: int, write: Path | None) -> None:
    """Trains, prints the table, writes it."""
    trained = [train(number, *way, batch) for number in unets for way in WAYS]
    text = f"{machine('torch', 'deepspeed')}\n\n{table(COLUMNS, [one.row for one in trained])}"
    publish(text, write, MARK)
    sys.exit(any(abs(one.ratio - 1) > TOLERANCE for one in trained))


if __name__ == "__main__":
    main()
