"""What fewer steps cost in quality, on a trained cascade.

    python benchmarks/steps_quality.py --run runs/emoji_demo

Makes a picture from every training caption with each sampler, and compares it with the picture
that the caption belongs to: how often is that the nearest of all (retrieval), and how far is it.
Writes the table into docs/sampling.md, between its markers, and docs/sampling_steps.png.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from imagen_scale.cascade import Cascade, to_uint8
from imagen_scale.data.dataset import prepare, real_pictures, split_indices
from imagen_scale.diffusion.sampler import num_evaluations
from imagen_scale.evaluation import retrieval_accuracy
from imagen_scale.pictures import save_grid

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- steps_quality -->", "<!-- /steps_quality -->"
ROWS = [
    ("DDPM", "ddpm", "linear", 1000),
    ("DDIM", "ddim", "linear", 50),
    ("DDIM", "ddim", "linear", 25),
    ("DPM-Solver++(2M)", "dpmpp_2m", "trailing", 25),
    ("DPM-Solver++(2M)", "dpmpp_2m", "trailing", 15),
    ("DPM-Solver++(2M)", "dpmpp_2m", "trailing", 10),
    *[("DPM-Solver++(2M)", "dpmpp_2m", spacing, 15) for spacing in ("linear", "logsnr", "karras")],
    ("SDE-DPM-Solver++(2M)", "dpmpp_2m_sde", "trailing", 25),
    ("SDE-DPM-Solver++(2M)", "dpmpp_2m_sde", "logsnr", 25),
    ("Heun", "heun", "trailing", 13),
    ("Heun", "heun", "karras", 13),
]  # fmt: skip
SHOWN = ["red heart", "sun", "strawberry", "pizza", "rocket", "rainbow", "grinning cat", "snowman"]
IN_PICTURE = [("ddpm", "linear", 1000), ("ddim", "linear", 50), ("dpmpp_2m", "trailing", 25),
              ("dpmpp_2m", "trailing", 15), ("dpmpp_2m", "trailing", 10)]  # fmt: skip


def main():
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/emoji_demo"))
    parser.add_argument("--cond-scale", type=float, default=2.0)
    parser.add_argument("--captions", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=1, help="pictures per caption")
    parser.add_argument("--only", help="sampler of the rows to measure; writes nothing")
    options = parser.parse_args()
    cascade = Cascade.load(options.run)
    prepared = prepare(cascade.files[0].config)
    indices = split_indices(prepared.source.keys, 0.0)[0][: options.captions]
    captions = [prepared.source.captions[i] for i in indices]
    size = cascade.files[-1].config.imagen.image_sizes[len(cascade.files) - 1]
    base_size = cascade.files[0].config.imagen.image_sizes[0]
    real = real_pictures(prepared, indices, size)
    lines = [
        "| sampler | spacing | steps | evaluations | retrieval | distance | seconds a picture |",
        "|---|---|---|---|---|---|---|",
    ]
    shown = {}
    for name, sampler, spacing, steps in ROWS:
        if options.only not in (None, sampler):
            continue
        start = time.perf_counter()
        accuracy, distance = 0.0, 0.0
        for seed in range(options.seeds):
            images = cascade.sample_stages(
                captions, seed=seed, steps=steps, sampler=sampler, spacing=spacing,
                cond_scale=options.cond_scale,
            )[-1]  # fmt: skip
            accuracy += retrieval_accuracy(images, real, base_size) / options.seeds
            distance += (images - real).square().flatten(1).mean(1).sqrt().mean() / options.seeds
            shown.setdefault((sampler, spacing, steps), images)
        seconds = (time.perf_counter() - start) / (len(captions) * options.seeds)
        lines.append(
            f"| {name} | {spacing} | {steps} | {num_evaluations(sampler, steps)} | "
            f"{accuracy:.1%} | {distance / 2:.4f} | {seconds:.3f} |"
        )
        print(lines[-1], flush=True)
    if options.only:
        return
    facts = {
        "captions": len(captions), "pictures per caption": options.seeds,
        "cond_scale": options.cond_scale, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "steps trained": [file.step for file in cascade.files],
    }  # fmt: skip
    text = "\n".join([*lines, "", f"Measured with: {json.dumps(facts)}."])
    document = ROOT / "docs" / "sampling.md"
    before, rest = document.read_text().split(BEGIN)
    document.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    chosen = [captions.index(caption) for caption in SHOWN]
    rows = [to_uint8(real[chosen])] + [to_uint8(shown[key][chosen]) for key in IN_PICTURE]
    save_grid(ROOT / "docs" / "sampling_steps.png", rows, SHOWN)


if __name__ == "__main__":
    main()
