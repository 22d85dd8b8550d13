"""What super-resolution learns from low-resolution pictures other than clean ones made small.

\b
    python benchmarks/quality.py --seeds 1 --steps 500 --only modern
    python benchmarks/lowres_inputs.py runs/quality/4_0

Trains the second stage of a run again, for as many steps and on the same base, with shares of its
samples degraded (`training.lowres_degrade`) or drawn by the base (`training.lowres_samples`). All
are measured on held-out pictures: what they restore of pictures made small, of small pictures that
were degraded, and how near what the whole cascade draws is to the real ones.
"""  # noqa: D301 - click reads the backspace

import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import click
import numpy as np
import torch
from evaluated import evaluated
from report import machine, publish, table, write_option
from torch import Tensor

from imagen_scale.config import dump_config, load_config
from imagen_scale.data.degradation import degraded
from imagen_scale.data.prepared import prepare, real_pictures
from imagen_scale.data.split import split
from imagen_scale.diffusion.lowres import enlarge
from imagen_scale.files.pictures import from_uint8, to_uint8
from imagen_scale.runs.folders import config_path, inference_path
from imagen_scale.sampling.measures import psnr_db
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.stage import Inputs
from imagen_scale.sampling.stages import TrainedStages

MARK = "lowres-inputs"
WAYS: dict[str, tuple[str, ...]] = {
    "none": (),
    "`lowres_degrade` 0.5": ("training.lowres_degrade=0.5",),
    "`lowres_samples` 0.5": ("training.lowres_samples=0.5",),
    "both, 0.3 each": ("training.lowres_degrade=0.3", "training.lowres_samples=0.3"),
}
COLUMNS = ("of other inputs", "clean, dB", "degraded, dB", "cascade: KID x 1000", "drift of 255")


@click.command(help=__doc__)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--num", type=click.IntRange(min=2), default=128, show_default=True,
              help="Held-out pictures.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default="runs/lowres_inputs",
              show_default=True)  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), default=25, show_default=True)
@write_option(MARK)
def main(run: Path, num: int, out: Path, steps: int, write: Path | None) -> None:
    """See the module."""
    rows = []
    for number, (name, changes) in enumerate(WAYS.items()):
        trained = train(run, out / str(number), changes)
        facts = evaluated(trained, num, steps, "--split", "held-out", "--cond-scale", "2")
        stage = facts["stages"][1]
        restored = stage["restoration"]
        rows.append([
            name, f"{restored['psnr_db'] - restored['bicubic_psnr_db']:+.2f}",
            f"{gain_on_degraded(trained, num, steps):+.2f}", f"{1000 * stage['kid']:.0f}",
            f"{255 * stage['colour_mean_drift']:+.1f}",
        ])  # fmt: skip
        click.echo(" | ".join(rows[-1]), err=True)
    text = (
        f"{table(COLUMNS, rows)}\n\ndB over the enlarged input, {facts['captions']} held-out "
        f"pictures, {steps} steps of sampling; one seed. {machine('torch', 'deepspeed')}"
    )
    publish(text, write, MARK)


def train(base: Path, run: Path, changes: tuple[str, ...]) -> Path:
    """The run with its second stage trained on the first one of another."""
    inference_path(run, 1).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(inference_path(base, 1), inference_path(run, 1))
    config_path(run).write_text(dump_config(load_config(config_path(base), changes)))
    command = ["imagen-scale", "train", str(config_path(run)), "--run", str(run), "--unet", "2"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return run


def gain_on_degraded(run: Path, num: int, steps: int) -> float:
    """PSNR over that of the enlarged input, dB, where the input is a degraded picture."""
    cascade = TrainedStages.load(run)
    config = cascade.configs[1]
    prepared = prepare(cascade.files[0].config)
    indices = split(cascade.files[0].config.data, prepared.source)[1][:num]
    real = real_pictures(prepared, indices, config.size)
    assert config.small_size is not None  # it is super-resolution
    small = as_people_have_them(real, config.small_size)
    encoded = cascade.encode([prepared.source.captions[i] for i in indices])
    settings = cascade.settings(SamplingOptions(steps=steps, cond_scale=2.0))[1]
    with closing(cascade.stage(2)) as stage:
        restored = stage.sample(Inputs(encoded.text, range(len(indices)), small), settings)
    enlarged = enlarge(small, config.size, config.size)
    return (psnr_db(restored, real) - psnr_db(enlarged, real)).mean().item()


def as_people_have_them(images: Tensor, side: int) -> Tensor:
    """Pictures degraded as `training.lowres_degrade` does it, (N, 3, side, side) in [-1, 1]."""
    pixels = to_uint8(images).transpose(0, 3, 1, 2)
    small = np.stack([degraded(picture, side, seed) for seed, picture in enumerate(pixels)])
    return from_uint8(torch.from_numpy(small))


if __name__ == "__main__":
    main()
