"""How fast sampling is, beside MinImagen's published package at equal network and weights.

    pip install --no-deps minimagen==0.0.9 einops einops-exts torchvision
    OMP_PLACES=cores OMP_PROC_BIND=true python benchmarks/sampling.py --write

The network is the block of configs/pokemon_64.json with random weights that MinImagen's own class
made. One guided evaluation (scale 3, one picture of 64 px, MinImagen's in two passes as it does)
of each variant in turn, round after round; medians, and the ratio of each round's MinImagen to
the variant. A picture is MinImagen's evaluation x 1000 steps (its thresholding and its posterior
not counted), and ours measured whole: 25 steps of DPM-Solver++(2M) with dynamic thresholding.

Rows that cannot be measured say why. ONNX Runtime and OpenVINO take every core: do not bind
OpenMP's threads when their rows count.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from imagen_scale.cascade import Settings, Stage
from imagen_scale.checkpoint import inference_path, read_inference, save_inference
from imagen_scale.config import load_config
from imagen_scale.errors import ImagenScaleError
from imagen_scale.runtimes import Options, Text, open_runtime

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- sampling_speed -->", "<!-- /sampling_speed -->"
STEPS, MINIMAGEN_STEPS, SCALE = 25, 1000, 3.0
ROWS = [
    ("torch, fp32", "torch", Options(precision="fp32")),
    ("torch, fp32, channels_last", "torch", Options(precision="fp32", channels_last=True)),
    ("torch, bf16", "torch", Options(precision="bf16")),
    ("torch, bf16, channels_last", "torch", Options(precision="bf16", channels_last=True)),
    ("torch.compile, fp32", "compile", Options(precision="fp32")),
    ("torch.compile, bf16", "compile", Options(precision="bf16")),
    ("ONNX Runtime, fp32", "onnx", Options(precision="fp32")),
    ("OpenVINO, fp32", "openvino", Options(precision="fp32")),
    ("OpenVINO, bf16", "openvino", Options(precision="bf16")),
]


def minimagen_unet(settings):
    """MinImagen's own U-Net; torchvision's compiled operators are not needed."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        from minimagen.Unet import Unet
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed; see the head of {__file__}.")
    torch.manual_seed(0)
    unet = Unet(**settings).eval().requires_grad_(False)
    # Its last layers start at zero, which would compare nothing.
    for parameter in unet.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    return unet


def write_run(run, unet, config):
    """The inference file of the peer's weights."""
    save_inference(
        inference_path(run, 1), unet.state_dict(), config=config, unet_number=1,
        text_embed_dim=512, text_fingerprint="0" * 16, step=1, steps=1,
    )  # fmt: skip
    return read_inference(inference_path(run, 1))


def export(file):
    """Makes the ONNX export that two runtimes read; says why where it cannot."""
    try:
        from imagen_scale_export.exporter import Options as ExportOptions
        from imagen_scale_export.exporter import export_unet

        # Not compared with the network here: the table does it.
        export_unet(file, ExportOptions(format="onnx", precision="fp32", check=False), print)
    except (ImagenScaleError, ModuleNotFoundError) as error:
        print(f"no export: {error}")


def timed(call):
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    """Measures, prints and, if asked, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="of single evaluations")
    parser.add_argument("--pictures", type=int, default=3, help="rounds of whole pictures")
    parser.add_argument("--only", nargs="*", help="rows to measure, by name")
    parser.add_argument("--write", action="store_true", help="put the table into docs/sampling.md")
    options = parser.parse_args()
    config = load_config(ROOT / "configs" / "pokemon_64.json")
    settings = json.loads((ROOT / "configs" / "pokemon_64.json").read_text())["unets"][0]
    peer = minimagen_unet(settings)
    size = config.imagen.image_sizes[0]
    generator = torch.Generator().manual_seed(0)
    text = Text(torch.randn(1, 32, 512, generator=generator), torch.ones(1, 32).bool())
    x_t, t = torch.randn(1, 3, size, size, generator=generator), torch.tensor([500])

    def reference():
        return peer.forward_with_cond_scale(
            x_t, t, text_embeds=text.embeds, text_mask=text.mask, cond_scale=SCALE
        )

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = write_run(Path(folder) / "run", peer, config)
        rows = [row for row in ROWS if not options.only or row[0] in options.only]
        if any(kind in ("onnx", "openvino") for _, kind, _ in rows):
            with torch.inference_mode(False):
                export(file)
        expected, missing, ready = reference(), [], {}
        for name, kind, how in rows:
            try:
                runtime = open_runtime(kind, file, device=torch.device("cpu"), options=how)
                denoiser = runtime.bind(text, cond_scale=SCALE, lowres_img=None, lowres_t=None)
                first = timed(lambda denoiser=denoiser: denoiser(x_t, t))
                error = (denoiser(x_t, t) - expected).abs().max() / expected.abs().max()
                ready[name] = kind, how, denoiser, first, error.item(), runtime
            except ImagenScaleError as problem:
                missing.append(f"{name}: {problem}")
        seconds = {name: [] for name in ("MinImagen", *ready)}
        for _ in range(options.rounds):
            seconds["MinImagen"].append(timed(reference))
            for name, (_, _, denoiser, *_) in ready.items():
                seconds[name].append(timed(lambda denoiser=denoiser: denoiser(x_t, t)))
        pictures = {name: [] for name in ready}
        stage = Stage(file, torch.device("cpu"))
        own, how = stage.runtime, Settings(steps=STEPS, cond_scale=SCALE)
        for _ in range(options.pictures):
            for name, (*_, runtime) in ready.items():
                stage.runtime = runtime
                pictures[name].append(timed(lambda: list(stage.parts(text, [0], how))))
        stage.runtime = own
    peer_s = seconds["MinImagen"]
    whole = statistics.median(peer_s) * MINIMAGEN_STEPS
    lines = [
        "| | evaluation (s) | times MinImagen | largest error / largest value | picture (s) | "
        "times MinImagen | first call (s) |",
        "|---|---|---|---|---|---|---|",
        f"| MinImagen 0.0.9, fp32, two passes | {statistics.median(peer_s):.3f} | 1 | | "
        f"{whole:.0f} (x 1000) | 1 | |",
    ]
    for name, (_, _, _, first, error, _) in ready.items():
        ratio = statistics.median(a / b for a, b in zip(peer_s, seconds[name], strict=True))
        picture = statistics.median(pictures[name])
        lines.append(
            f"| {name} | {statistics.median(seconds[name]):.3f} | {ratio:.2f} | {error:.1e} | "
            f"{picture:.2f} | {whole / picture:.0f} | {first:.1f} |"
        )
    lines += ["", *(f"Not measured: {line}" for line in missing)]
    facts = f"{os.cpu_count()} cores ({platform.processor() or platform.machine()}), torch "
    facts += f"{torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds"
    text_out = "\n".join([*lines, f"{facts}."])
    print(text_out)
    if options.write:
        document = ROOT / "docs" / "sampling.md"
        before, rest = document.read_text().split(BEGIN)
        document.write_text(f"{before}{BEGIN}\n{text_out}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
