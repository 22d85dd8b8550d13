"""What fewer steps cost in quality, on a trained cascade.

\b
    python benchmarks/steps_quality.py --run runs/emoji_demo
    python benchmarks/steps_quality.py --write docs/sampling.md    table and picture

Makes a picture from every training caption with each sampler, and compares it with the picture
that the caption belongs to: how often is that the nearest of all (retrieval), and how far is it.
"""  # noqa: D301 - click reads the backspace

from pathlib import Path
from typing import NamedTuple

import click
from report import publish, table, versions, write_option

from imagen_scale.data.prepared import prepare, real_pictures
from imagen_scale.data.sequence import split_indices
from imagen_scale.diffusion.reverse import num_evaluations
from imagen_scale.evaluation import retrieval_accuracy
from imagen_scale.files.pictures import save_grid, to_uint8
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.stages import TrainedStages

MARK = "steps_quality"
COLUMNS = ("sampler", "spacing", "steps", "evaluations", "retrieval", "distance")


class Row(NamedTuple):
    """One way to sample."""

    name: str
    sampler: str
    spacing: str
    steps: int
    is_pictured: bool = False


ROWS = (
    Row("DDPM", "ddpm", "linear", 1000, is_pictured=True),
    Row("DDIM", "ddim", "linear", 50, is_pictured=True),
    Row("DDIM", "ddim", "linear", 25),
    Row("DPM-Solver++(2M)", "dpmpp_2m", "logsnr", 25),
    Row("DPM-Solver++(2M)", "dpmpp_2m", "logsnr", 15, is_pictured=True),
    Row("DPM-Solver++(2M)", "dpmpp_2m", "logsnr", 10, is_pictured=True),
    Row("DPM-Solver++(2M)", "dpmpp_2m", "logsnr", 5, is_pictured=True),
    Row("DPM-Solver++(2M)", "dpmpp_2m", "trailing", 25),
    Row("DPM-Solver++(2M)", "dpmpp_2m", "trailing", 10),
    Row("DPM-Solver++(2M)", "dpmpp_2m", "trailing", 5),
    Row("DPM-Solver++(2M)", "dpmpp_2m", "trailing", 2),
    Row("DPM-Solver++(2M)", "dpmpp_2m", "linear", 15),
    Row("DPM-Solver++(2M)", "dpmpp_2m", "karras", 15),
    Row("SDE-DPM-Solver++(2M)", "dpmpp_2m_sde", "trailing", 25),
    Row("SDE-DPM-Solver++(2M)", "dpmpp_2m_sde", "logsnr", 25),
    Row("Heun", "heun", "logsnr", 13),
    Row("Heun", "heun", "trailing", 13),
)
SHOWN = ["red heart", "sun", "strawberry", "pizza", "rocket", "rainbow", "grinning cat", "snowman"]


@click.command(help=__doc__)
@click.option("--run", type=click.Path(exists=True, file_okay=False, path_type=Path),
              default="runs/emoji_demo", show_default=True, help="A trained cascade.")  # fmt: skip
@click.option("--cond-scale", type=float, default=2.0, show_default=True)
@click.option("--captions", "count", type=click.IntRange(min=1), default=48, show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True,
              help="Pictures per caption.")  # fmt: skip
@click.option("--only", multiple=True, type=click.Choice(sorted({row.sampler for row in ROWS})),
              help="A sampler.")  # fmt: skip
@write_option(MARK, help="A document; the picture goes beside it.")
def main(
    run: Path, cond_scale: float, count: int, seeds: int, only: tuple[str, ...],
    write: Path | None,
) -> None:  # fmt: skip
    """Measures, prints and writes."""
    if write is not None and only:
        raise click.UsageError("--write takes every row; leave out --only.")
    cascade = TrainedStages.load(run)
    prepared = prepare(cascade.files[0].config)
    indices = split_indices(prepared.source.keys, 0.0)[0][:count]
    captions = [prepared.source.captions[i] for i in indices]
    configs = cascade.configs
    real = real_pictures(prepared, indices, configs[-1].size)
    lines, shown = [], {}
    for row in ROWS:
        if only and row.sampler not in only:
            continue
        accuracy, distance = 0.0, 0.0
        for seed in range(seeds):
            images = cascade.sample(
                captions,
                SamplingOptions(seed=seed, steps=row.steps, sampler=row.sampler,
                                spacing=row.spacing, cond_scale=cond_scale),
            )[-1]  # fmt: skip
            accuracy += retrieval_accuracy(images, real, configs[0].size) / seeds
            distance += (images - real).square().flatten(1).mean(1).sqrt().mean().item() / seeds
            shown.setdefault(row, images)
        evaluations = num_evaluations(row.sampler, row.steps)
        lines.append([
            row.name, row.spacing, str(row.steps), str(evaluations), f"{accuracy:.1%}",
            f"{distance / 2:.4f}",
        ])  # fmt: skip
        click.echo(" ".join(lines[-1]), err=True)
    trained = " and ".join(str(file.step) for file in cascade.files)
    text = "\n\n".join([
        table(COLUMNS, lines),
        f"{len(captions)} captions, {seeds} picture{'s' * (seeds > 1)} each; guidance "
        f"{cond_scale:g}; stages trained for {trained} steps; {versions('torch')}.",
    ])  # fmt: skip
    publish(text, write, MARK)
    if write is not None:
        chosen = [captions.index(caption) for caption in SHOWN]
        rows = [to_uint8(real[chosen])]
        rows += [to_uint8(shown[row][chosen]) for row in ROWS if row.is_pictured]
        save_grid(write.parent / "sampling_steps.png", rows, SHOWN)


if __name__ == "__main__":
    main()
