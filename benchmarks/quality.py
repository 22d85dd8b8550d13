"""What a recipe is worth: one network, one set of pictures, one number of steps; several recipes.

\b
    python benchmarks/quality.py --seeds 3
    python benchmarks/quality.py --seeds 3 --write docs/quality.md

Trains the cascade of configs/emoji_demo.json on all plain emoji (a tenth held out by hash) once
for each recipe and seed: the published packages MinImagen and imagen-pytorch with their own
objectives and optimizers, and this project's trainer. All are measured on the held-out pictures as
`imagen-scale evaluate` does it. What was measured stays in --out; started again, it goes on where
it stopped.
"""  # noqa: D301 - click reads the backspace

import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import peers
from evaluated import evaluated
from report import machine, publish, split_at_marks, table

from imagen_scale.config import load_config
from imagen_scale.data.prepared import prepare, real_pictures
from imagen_scale.data.sequence import split_indices
from imagen_scale.files.pictures import save_grid, to_uint8
from imagen_scale.sampling.cascade import Cascade

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "emoji_demo.json"
SHOWN, STEPS, SCALE = 8, 25, 2.0
PACKAGE, OTHER = "MinImagen 0.0.9", "imagen-pytorch 2.1.0"
MODERN, EQUAL = "modern", "modern, in MinImagen's time"
PLAIN = ("training.recipe=null", "imagen.lowres_sample_noise_level=0.02",
         "imagen.dynamic_thresholding_percentile=0.95")  # fmt: skip
MINIMAGENS = (*PLAIN, "training.lr=0.0001", "training.lowres_aug_max=1.0")
NOISE = (*PLAIN, "training.lr=0.002", "training.lowres_aug_max=0.2")
# Changes to the demo's configuration.
RECIPES: dict[str, tuple[str, ...]] = {
    PACKAGE: (*MINIMAGENS, "unets.0.max_text_len=256", "unets.1.max_text_len=256"),
    "MinImagen's way, our trainer": MINIMAGENS,
    "noise, lr 2e-3": NOISE,
    "v, lr 2e-3": (*NOISE, "unets.0.pred_type=v", "unets.1.pred_type=v"),
    MODERN: (),
    "modern, Muon": ("training.optimizer=muon",),
    OTHER: (*PLAIN, "unets.0.max_text_len=256", "unets.1.max_text_len=256"),
    EQUAL: (),  # last: the folders in --out are numbered in this order
}


class Measured(NamedTuple):
    """One training, measured."""

    seconds: float  # of processor time that the base's training took, its start included
    x_0_error: float  # of the base, over the log-SNRs of the evaluation
    drift: float  # of the base's mean colours, of 255
    plain_drift: float  # the same without guidance, which moves colours by itself
    kid: float  # x 1000, of the base
    psnr_gain: float  # of super-resolution over the enlarged picture, dB
    sr_drift: float


@click.command(help=__doc__)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--seeds-of", type=(click.Choice(list(RECIPES)), click.IntRange(min=1)),
              multiple=True, help="Of a recipe that takes long.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), default=700, show_default=True)
@click.option("--pictures", type=click.IntRange(min=2), default=96, show_default=True,
              help="Held-out pictures that are measured.")  # fmt: skip
@click.option("--only", multiple=True, type=click.Choice(list(RECIPES)), help="Of the recipes.")
@click.option("--peers", "folder", type=click.Path(path_type=Path), default=".benchmarks/peers",
              show_default=True, help="Where the published packages are installed.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default="runs/quality", show_default=True)
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), help="A document.")
def main(
    seeds: int, seeds_of: tuple[tuple[str, int], ...], steps: int, pictures: int,
    only: tuple[str, ...], folder: Path, out: Path, write: Path | None,
) -> None:  # fmt: skip
    """See the module."""
    mark = f"quality-{steps}"  # a document has one part, and one picture, for each
    if write is not None:
        split_at_marks(write, mark)
    names = [name for name in RECIPES if name in only or not only]
    if EQUAL in names and not {MODERN, PACKAGE} <= set(names):
        raise click.UsageError(f"--only {EQUAL!r} is as long as {PACKAGE!r}: ask for it and for "
                               f"{MODERN!r}, too.")  # fmt: skip
    if {PACKAGE, OTHER} & set(names):
        peers.install(folder)
    found: dict[str, list[Measured]] = {name: [] for name in names}
    wanted = seeds_of_each(names, seeds, dict(seeds_of))
    for seed in range(max(wanted.values())):
        for name in (name for name in names if seed < wanted[name]):
            run = out / f"{list(RECIPES).index(name)}_{seed}"
            taken = steps_in_equal_time(found, steps)[seed] if name == EQUAL else steps
            changes = [*RECIPES[name], f"training.steps={taken}", f"training.seed={seed}"]
            found[name].append(measured(name, run, changes, folder, pictures))
            click.echo(f"{name}, seed {seed}: {found[name][-1]}", err=True)
    text = report(found, steps, pictures)
    publish(text, write, mark)
    if write is not None:
        draw(write.with_name(f"{mark}.png"), [out / f"{list(RECIPES).index(n)}_0" for n in names])


def seeds_of_each(names: list[str], seeds: int, asked: dict[str, int]) -> dict[str, int]:
    """How many trainings of each recipe; in equal time no more than of those it compares."""
    wanted = {name: asked.get(name, seeds) for name in names}
    if EQUAL in names:
        wanted[EQUAL] = min(wanted[name] for name in (EQUAL, PACKAGE, MODERN))
    return wanted


def steps_in_equal_time(found: dict[str, list[Measured]], steps: int) -> list[int]:
    """How many steps the recipe takes in the time of MinImagen's base, for each seed."""
    pairs = zip(found[PACKAGE], found[MODERN], strict=False)
    return [round(steps * package.seconds / ours.seconds) for package, ours in pairs]


def common() -> list[str]:
    """What this set of pictures changes in the demo's configuration."""
    return ["data.names=null", "data.val_fraction=0.1", "training.sample_every=null",
            "training.warmup_steps=null"]  # fmt: skip


def measured(name: str, run: Path, changes: list[str], folder: Path, pictures: int) -> Measured:
    """Trains and measures once, if that was not done before."""
    kept, told = run / "measured.json", [*changes, f"{pictures} pictures"]
    if kept.is_file():
        before = json.loads(kept.read_text())
        if before["changes"] == told:
            return Measured(**before["measured"])
        raise click.UsageError(f"{run} was trained otherwise; remove it, or take another --out.")
    if name == OTHER:
        _child(folder, "quality_imagen_pytorch.py", str(run), str(pictures), *common(), *changes)
        result = Measured(**json.loads((run / "measured_by_peer.json").read_text()))
    elif name == PACKAGE:
        _child(folder, "quality_minimagen.py", str(run), *common(), *changes)
        result = _evaluated(run, json.loads((run / "seconds.json").read_text()), pictures)
    else:
        words = [part for change in [*common(), *changes] for part in ("--set", change)]
        before = _processor_s()
        train = ["imagen-scale", "train", str(CONFIG), "--run", str(run), *words]
        subprocess.run([*train, "--unet", "1"], check=True, stdout=subprocess.DEVNULL)
        seconds = _processor_s() - before
        subprocess.run([*train, "--unet", "2"], check=True, stdout=subprocess.DEVNULL)
        result = _evaluated(run, seconds, pictures)
    kept.write_text(json.dumps({"changes": told, "measured": result._asdict()}))
    return result


def _child(folder: Path, script: str, *words: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *words]
    subprocess.run(command, check=True, env=peers.environment(folder, 1))


def _evaluated(run: Path, seconds: float, pictures: int) -> Measured:
    (plain,) = _stages(run, pictures, 1.0, "--unet-limit", "1")
    base, larger = _stages(run, pictures, SCALE)
    restored = larger["restoration"]
    return Measured(
        seconds, base["x_0_error"], 255 * base["colour_mean_drift"],
        255 * plain["colour_mean_drift"], 1000 * base["kid"],
        restored["psnr_db"] - restored["bicubic_psnr_db"], 255 * larger["colour_mean_drift"],
    )  # fmt: skip


def _stages(run: Path, pictures: int, cond_scale: float, *words: str) -> list[dict[str, Any]]:
    facts = evaluated(run, pictures, STEPS, "--cond-scale", str(cond_scale), *words)
    found: list[dict[str, Any]] = facts["stages"]
    return found


def draw(path: Path, runs: list[Path]) -> None:
    """A grid of held-out captions: a row of each run's last stage, the real pictures below."""
    config = load_config(CONFIG, tuple(common()))
    prepared = prepare(config)
    indices = split_indices(prepared.source.keys, config.data.val_fraction)[1][:SHOWN]
    captions = [prepared.source.captions[i] for i in indices]
    rows = []
    for run in runs:
        if (drawn := run / "pictures.npy").is_file():  # by its own package
            rows.append(np.load(drawn)[:SHOWN])
        else:
            sampled = Cascade.load(run).sample(captions, steps=STEPS, cond_scale=SCALE)
            rows.append(np.stack([np.asarray(picture) for picture in sampled]))
    rows.append(to_uint8(real_pictures(prepared, indices, config.imagen.image_sizes[-1])))
    save_grid(path, rows, captions)


def _processor_s() -> float:
    """Of all child processes that have ended; other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def report(found: dict[str, list[Measured]], steps: int, pictures: int) -> str:
    """The table, with what it was measured on."""
    forms = (".0f", ".3f", "+.1f", "+.1f", ".0f", "+.2f", "+.1f")
    rows = [
        [name, str(len(trainings)), *(_spread(values, form) for values, form in zip(
            zip(*trainings, strict=True), forms, strict=True))]
        for name, trainings in found.items()
    ]  # fmt: skip
    columns = ("recipe", "seeds", "base, CPU s", "x_0 error", "drift of 255", "without guidance",
               "KID x 1000", "over the enlarged picture, dB", "drift of 255, 64 px")  # fmt: skip
    equal = ""
    if EQUAL in found:
        taken = steps_in_equal_time(found, steps)[: len(found[EQUAL])]
        equal = f", in MinImagen's time {' and '.join(map(str, taken))}"
    return (
        f"{table(columns, rows)}\n\n{steps} steps of each stage{equal}, {pictures} held-out "
        f"pictures; of several seeds mean and, in brackets, least and most. "
        f"{machine('torch', 'deepspeed')}"
    )


def _spread(values: tuple[Any, ...], form: str) -> str:
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
