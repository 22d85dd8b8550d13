"""What few steps keep where a caption means many pictures.

\b
    python benchmarks/few_steps.py --write docs/few_steps.md

Trains a base stage on the demo's drawings, captioned with what they are kinds of ("fruit",
"vehicle", ...), teaches it fewer steps, and draws many pictures of each caption with the teacher
and the students, from the same noise. Runs stay in --out; started again, it goes on with them.
"""  # noqa: D301 - click reads the backspace

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from PIL import Image
from report import machine, publish, table, write_option
from torch import Tensor

from imagen_scale.config.sections import DataConfig
from imagen_scale.data.sources.emoji import OPENMOJI_ATTRIBUTION, EmojiSource
from imagen_scale.evaluation.diversity import diversity
from imagen_scale.files.pictures import from_uint8, save_grid, to_uint8
from imagen_scale.runs.folders import inference_path
from imagen_scale.sampling.measures import nearest_distance, root_mean_square
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stages import TrainedStages

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "emoji_demo.json"
MARK, SIZE, SHOWN = "few-steps-open", 16, 2
KINDS = {
    "fruit": ["red apple", "green apple", "banana", "strawberry", "watermelon", "grapes", "lemon"],
    "food": ["pizza", "hamburger", "ice cream", "doughnut", "birthday cake", "hot beverage",
             "beer mug"],
    "game or music": ["soccer ball", "basketball", "tennis", "trophy", "guitar", "trumpet", "drum"],
    "vehicle": ["airplane", "rocket", "sailboat", "bicycle", "locomotive", "tractor"],
    "building": ["house", "castle", "tent"],
    "weather and sky": ["sun", "crescent moon", "rainbow", "volcano", "fire", "droplet", "snowman",
                        "umbrella"],
    "plant": ["cactus", "deciduous tree", "evergreen tree", "four leaf clover", "sunflower",
              "tulip", "mushroom"],
    "face": ["grinning face", "grinning cat"],
}  # fmt: skip
COLUMNS = ("base, 16 px, guidance {}", "evaluations", "from the nearest drawing", "drawings met",
           "spread", "of the teacher's", "from the teacher's 25 steps")  # fmt: skip


class Way(NamedTuple):
    """A stage, sampled in so many steps."""

    name: str
    run: Path
    steps: int
    cond_scale: float

    @property
    def evaluations(self) -> int:
        """Of the network, for a picture."""
        return self.steps * (1 if self.cond_scale == 1 else 2)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path),
              default=Path("runs/few_steps"), show_default=True)  # fmt: skip
@click.option("--train-steps", type=click.IntRange(min=2), default=1500, show_default=True)
@click.option("--distill-steps", type=click.IntRange(min=2), default=300, show_default=True)
@click.option("--students", default="8,4,2,1", show_default=True, help="Steps to teach.")
@click.option("--cond-scale", type=float, default=2.0, show_default=True)
@click.option("--num", type=click.IntRange(min=2), default=32, show_default=True,
              help="Pictures of each caption.")  # fmt: skip
@write_option(MARK)
def main(
    out: Path, train_steps: int, distill_steps: int, students: str, cond_scale: float, num: int,
    write: Path | None,
) -> None:  # fmt: skip
    """See the module."""
    taught = [int(steps) for steps in students.split(",")]
    drawings = written_drawings(out / "drawings")
    teacher = out / "teacher"
    if not inference_path(teacher, 1).exists():
        config = out / "config.json"
        config.write_text(json.dumps(configuration(out, train_steps), indent=1))
        run("imagen-scale", "train", config, "--run", teacher)
    ways = [Way(f"teacher, {steps}", teacher, steps, cond_scale) for steps in (25, *taught)]
    for steps in taught:
        student = out / f"student{steps}"
        if not inference_path(student, 1).exists():
            run("imagen-scale", "distill", teacher, "--to", student.name, "--steps", steps,
                "--cond-scale", cond_scale, "--train-steps", distill_steps,
                "--set", "training.lr=0.001")  # fmt: skip
        ways.append(Way(f"**student, {steps}**", student, steps, 1))

    drawn = [pictures_of(way, num) for way in ways]
    rows = [row(way, ours, drawn[0], drawings) for way, ours in zip(ways, drawn, strict=True)]
    text = (
        f"{table([name.format(f'{cond_scale:g}') for name in COLUMNS], rows)}\n\n"
        f"{sum(map(len, KINDS.values()))} drawings of {len(KINDS)} captions, {num} pictures of "
        f"each caption; {train_steps} steps of training, {distill_steps} of teaching, one of "
        f"each. {machine('torch')}"
    )
    publish(text, write, MARK)
    picture = out / "few_steps.png" if write is None else write.with_name("few_steps_open.png")
    shown = [drawn[0], *drawn[1 + len(taught) :]]
    save_grid(picture, [to_uint8(torch.stack([made[i] for made in ours])) for ours in shown
                        for i in range(SHOWN)], list(KINDS))  # fmt: skip


def run(*words: Any) -> None:
    """A command whose output only matters where it fails."""
    subprocess.run([str(word) for word in words], check=True)


def written_drawings(folder: Path) -> list[Tensor]:
    """The data set as a folder of pictures with captions beside them.

    Returns:
        Of each caption its drawings, (N, 3, SIZE, SIZE) in [-1, 1].
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for kind, names in KINDS.items():
        source = EmojiSource(DataConfig(source="emoji", names=tuple(names)))
        pixels = [source.image(i, SIZE) for i in range(len(source))]
        for name, picture in zip(names, pixels, strict=True):
            Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(kind)
        found.append(from_uint8(torch.stack([torch.from_numpy(picture) for picture in pixels])))
    (folder / "ATTRIBUTION").write_text(OPENMOJI_ATTRIBUTION)
    return found


def configuration(out: Path, steps: int) -> dict[str, Any]:
    """The demo's base stage, on these drawings."""
    config = json.loads(CONFIG.read_text())
    config["imagen"]["image_sizes"] = [SIZE]
    config["unets"] = config["unets"][:1]
    config["data"] = {"source": "folder", "path": str((out / "drawings").resolve())}
    config["training"] |= {
        "steps": steps, "global_batch": 32, "sample_prompts": list(KINDS),
        "sample_every": None,
    }  # fmt: skip
    return config


def pictures_of(way: Way, num: int) -> list[Tensor]:
    """Of each caption `num` pictures in [-1, 1]; every way begins with the same noise."""
    stages = TrainedStages.load(
        way.run, runtime=RuntimeOptions(runtime="torch", precision="fp32"), say=lambda text: None
    )
    asked = {} if way.cond_scale == 1 else {"cond_scale": way.cond_scale}
    options = SamplingOptions.make(steps=way.steps, num=num, **asked)
    with torch.no_grad():
        (made,) = stages.sample(list(KINDS), options)
    return list(made.split(num))


def row(way: Way, ours: list[Tensor], teachers: list[Tensor], drawings: list[Tensor]) -> list[str]:
    """What was measured of one way."""
    near, met = [], 0
    for made, real in zip(ours, drawings, strict=True):
        near.append(nearest_distance(made, real))
        met += torch.cdist(made.flatten(1), real.flatten(1)).argmin(1).unique().numel()
    apart = torch.cat([root_mean_square(a, b) for a, b in zip(ours, teachers, strict=True)])
    return [
        way.name, str(way.evaluations), f"{torch.cat(near).mean():.4f}",
        f"{met} of {sum(map(len, drawings))}", f"{spread(ours):.4f}",
        f"{spread(ours) / spread(teachers):.2f}", f"{apart.mean():.4f}",
    ]  # fmt: skip


def spread(ours: list[Tensor]) -> float:
    """Root mean square difference between two pictures of one caption, levels 0 to 1."""
    return diversity(list(torch.stack(ours, 1))).same_caption


if __name__ == "__main__":
    main()
