"""A cascade beside a GAN: the same pictures, captions, parameters and processor time.

\b
    python benchmarks/gigagan.py --steps 300
    python benchmarks/gigagan.py --steps 300 --write docs/gigagan.md

Trains the cascade of configs/emoji_demo.json on all plain emoji (a tenth held out by hash), teaches
its base four steps, and lets gigagan-pytorch train for as many seconds of processor time, with a
generator of as many parameters. Held-out captions are then drawn by all of them.
"""  # noqa: D301 - click reads the backspace

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import peers
import torch
from report import machine, publish, table, write_option
from safetensors.torch import load_file
from torch import Tensor

from imagen_scale.config import load_config
from imagen_scale.data.prepared import prepare, real_pictures
from imagen_scale.data.sequence import split_indices
from imagen_scale.evaluation.colour_words import agreement, shares
from imagen_scale.evaluation.distances import kernel_distance
from imagen_scale.evaluation.features import open_extractor
from imagen_scale.files.pictures import save_grid, to_uint8
from imagen_scale.runs.folders import config_path, inference_path
from imagen_scale.runs.inference import load_weights
from imagen_scale.sampling.cascade import Cascade
from imagen_scale.sampling.measures import retrieval_accuracy
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.prompts import encode
from imagen_scale.sampling.stage import Inputs
from imagen_scale.sampling.stages import TrainedStages

CONFIG = peers.ROOT / "configs" / "emoji_demo.json"
CHILD = peers.ROOT / "benchmarks" / "gigagan_child.py"
MARK, SHOWN = "gigagan", 8
CHANGES = ("data.names=null", "data.val_fraction=0.1", "training.sample_every=null",
           "training.warmup_steps=null")  # fmt: skip
COLUMNS = ("", "parameters", "training, CPU s", "pictures of 64 px seen, a CPU s",
           "a picture, CPU s", "evaluations", "KID x 1000", "retrieval",
           "named colours shown")  # fmt: skip
ROUNDS = 3  # of single pictures


class Row(NamedTuple):
    """One way to draw, trained."""

    name: str
    parameters: int
    seconds: float  # of processor time spent on training
    seen: int  # pictures of the last size that training read
    picture: float  # seconds of processor time for one by itself, everything loaded
    evaluations: str
    pictures: Tensor  # (N, 3, H, W) in [-1, 1]


@click.command(help=__doc__)
@click.option("--steps", type=click.IntRange(min=1), default=1500, show_default=True,
              help="Of each stage of the cascade.")  # fmt: skip
@click.option("--pictures", type=click.IntRange(min=8), default=96, show_default=True,
              help="Held-out captions.")  # fmt: skip
@click.option("--peers", "folder", type=click.Path(path_type=Path), default=".benchmarks/gigagan",
              show_default=True, help="Where gigagan-pytorch is installed.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default="runs/gigagan", show_default=True)
@write_option(MARK)
def main(steps: int, pictures: int, folder: Path, out: Path, write: Path | None) -> None:
    """See the module."""
    peers.install(folder, peers.GIGAGAN)
    run = out / "cascade"
    words = [part for change in (*CHANGES, f"training.steps={steps}") for part in ("--set", change)]
    trained = processor_s("imagen-scale", "train", str(CONFIG), "--run", str(run), *words)
    taught = processor_s("imagen-scale", "distill", str(run), "--steps", "4,keep",
                         "--cond-scale", "2", "--set", "training.lr=0.001")  # fmt: skip
    student = run.with_name(f"{run.name}_steps4-keep")
    config = load_config(config_path(run))
    prepared = prepare(config)
    _, held_out = split_indices(prepared.source.keys, config.data.val_fraction)
    chosen = held_out[:pictures]
    captions = [prepared.source.captions[i] for i in chosen]
    (out / "captions.json").write_text(json.dumps(captions))

    parameters = sum(
        tensor.numel() for number in (1, 2)
        for tensor in load_weights(inference_path(run, number)).values()
    )  # fmt: skip
    seen = steps * config.stages()[-1].global_batch
    rows = [
        cascade_row("imagen-scale, 25 + 25 steps", run, captions, parameters, trained, seen,
                    "50 + 25", steps=25, cond_scale=2.0),
        cascade_row("imagen-scale, taught 4 steps, + 2", student, captions, parameters,
                    trained + taught, seen, "4 + 2", steps=(4, 2)),
    ]  # fmt: skip
    child = [sys.executable, str(CHILD), str(run), str(out)]
    child += ["--seconds", str(trained + taught), "--parameters", str(parameters)]
    subprocess.run(child, check=True, env=peers.environment(folder, 1, bind=False))
    facts = json.loads((out / "gigagan.json").read_text())
    rows.append(Row(
        f"gigagan-pytorch {peers.GIGAGAN[0].partition('==')[2]}", facts["parameters"],
        facts["seconds"], facts["pictures"], facts["picture"], "1",
        load_file(out / "gigagan.safetensors")["pictures"],
    ))  # fmt: skip
    real = real_pictures(prepared, chosen, config.imagen.image_sizes[-1])
    text = page(rows, real, captions, steps)
    drawn = [to_uint8(row.pictures[:SHOWN]) for row in rows]
    save_grid(out / "pictures.png", [*drawn, to_uint8(real[:SHOWN])], captions[:SHOWN])
    publish(text, write, MARK)
    if write is not None:
        write.with_suffix(".png").write_bytes((out / "pictures.png").read_bytes())


def processor_s(*command: str) -> float:
    """Runs a command; seconds of processor time that it and its children took."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
    return used() - before


def cascade_row(
    name: str, run: Path, captions: list[str], parameters: int, seconds: float, seen: int,
    evaluations: str, **options: Any,
) -> Row:  # fmt: skip
    """A trained cascade, and what it draws."""
    made = Cascade.load(run).sample(captions, **options)
    pictures = torch.from_numpy(np.stack([np.asarray(one) for one in made]))
    return Row(name, parameters, seconds, seen, picture_s(run, captions[0], options), evaluations,
               pictures.permute(0, 3, 1, 2).float() / 127.5 - 1)  # fmt: skip


def picture_s(run: Path, caption: str, options: dict[str, Any]) -> float:
    """Seconds of processor time of one picture's evaluations in all stages, median of some."""
    stages = TrainedStages.load(run)
    settings = stages.settings(SamplingOptions.make(**options))
    text, _ = encode(stages.files, [caption])
    total, lowres = 0.0, None
    for config, how in zip(stages.configs, settings, strict=True):
        with closing(stages.stage(config.number)) as stage:
            times = []
            for _ in range(ROUNDS):
                start = time.process_time()
                made = stage.sample(Inputs(text, [0], lowres), how)
                times.append(time.process_time() - start)
        lowres, total = made, total + statistics.median(times)
    return total


def page(rows: list[Row], real: Tensor, captions: list[str], steps: int) -> str:
    """The table and what it was measured on."""
    extractor = open_extractor("efficientnet-lite0")
    features, colours = extractor(real), shares(real)
    lines = []
    for row in rows:
        words = agreement(captions, shares(row.pictures), colours)
        lines.append([
            row.name, f"{row.parameters / 1e6:.2f} M", f"{row.seconds:.0f}",
            f"{row.seen / row.seconds:.1f}", f"{row.picture:.2f}", row.evaluations,
            f"{1000 * kernel_distance(extractor(row.pictures), features):.0f}",
            f"{retrieval_accuracy(row.pictures, real, 16):.0%}",
            f"{words.shown:.0%} of {words.asked}" if words else "-",
        ])  # fmt: skip
    words = agreement(captions, colours, colours)
    lines.append(["the pictures themselves", *[""] * 5, "0", "100%",
                  f"{words.shown:.0%} of {words.asked}" if words else "-"])  # fmt: skip
    return (
        f"{table(COLUMNS, lines)}\n\n{len(captions)} held-out captions; {steps} steps of each "
        f"stage of the cascade, whose training starts three processes, which count; chance of "
        f"retrieval {1 / len(captions):.1%}. {machine('torch', 'deepspeed')}"
    )


if __name__ == "__main__":
    main()
