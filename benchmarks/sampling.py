"""How fast sampling is, beside MinImagen's published package at equal network and weights.

\b
    python benchmarks/sampling.py                             every row, prints the table
    python benchmarks/sampling.py --only "torch, fp32"        some
    python benchmarks/sampling.py --write docs/sampling.md    into the document, between marks

The network is the block of configs/pokemon_64.json with random weights that MinImagen's own class
made. One guided evaluation (scale 3, one picture of 64 px, MinImagen's in two passes as it does)
of each variant in turn, round after round; medians, and the ratio of each round's MinImagen to
the variant. A picture is MinImagen's evaluation x 1000 steps (its thresholding and its posterior
not counted), and ours measured whole: 25 steps of DPM-Solver++(2M) with dynamic thresholding, and
in a second table 4, 2 and 1 evaluations without guidance, as a stage takes them that was taught to
(`imagen-scale distill`).

Rows that cannot be measured say why.
"""  # noqa: D301 - click reads the backspace

import importlib.metadata
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import peers
import torch
from report import machine, publish, table, write_option
from torch import Tensor

from imagen_scale.config import Config, load_config
from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.errors import ImagenScaleError
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import InferenceFile, read_inference, save_inference
from imagen_scale.sampling.options import StageSettings
from imagen_scale.sampling.runtimes.contract import Conditioning, Text
from imagen_scale.sampling.runtimes.opening import open_runtime
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stage import Inputs, Stage

CONFIG = peers.ROOT / "configs" / "pokemon_64.json"
MARK = "sampling_speed"
COLUMNS = ("", "guided evaluation", "times MinImagen", "largest error / largest value", "picture",
           "times MinImagen", "first call")  # fmt: skip
FEW = (4, 2, 1)
FEW_COLUMNS = ("", *(word for steps in FEW for word in (
    f"{steps} evaluation{'s' if steps > 1 else ''}", "times MinImagen",
)))  # fmt: skip
STEPS, MINIMAGEN_STEPS, SCALE = 25, 1000, 3.0
ROWS = [
    ("torch, fp32", RuntimeOptions(runtime="torch", precision="fp32")),
    (
        "torch, fp32, channels_last",
        RuntimeOptions(runtime="torch", precision="fp32", channels_last=True),
    ),
    ("torch, bf16", RuntimeOptions(runtime="torch", precision="bf16")),
    (
        "torch, bf16, channels_last",
        RuntimeOptions(runtime="torch", precision="bf16", channels_last=True),
    ),
    ("torch.compile, fp32", RuntimeOptions(runtime="compile", precision="fp32")),
    ("torch.compile, bf16", RuntimeOptions(runtime="compile", precision="bf16")),
    ("ONNX Runtime, fp32", RuntimeOptions(runtime="onnx", precision="fp32")),
    ("OpenVINO, fp32", RuntimeOptions(runtime="openvino", precision="fp32")),
    ("OpenVINO, bf16", RuntimeOptions(runtime="openvino", precision="bf16")),
]


class Ready(NamedTuple):
    """One way to sample that works here."""

    runtime: Any
    evaluate: Callable[[], Tensor]
    first: float  # seconds of the first call
    error: float  # largest difference from MinImagen, over the largest value


def minimagen_unet(settings: dict[str, Any]) -> Any:
    """MinImagen's own U-Net."""
    unet_class, _ = peers.import_unets()
    torch.manual_seed(0)
    unet = unet_class(**settings).eval().requires_grad_(False)
    # Its last layers start at zero, which would compare nothing.
    for parameter in unet.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    return unet


def write_run(run: Path, unet: Any, config: Config, number: int = 1) -> InferenceFile:
    """The inference file of the peer's weights, and their ONNX export where it can be made."""
    file = InferenceFile(
        inference_path(run, number), config, number, text_embed_dim=512,
        text_fingerprint="0" * 16,
        step=1, steps=1,
    )  # fmt: skip
    save_inference(file, {name: value.contiguous() for name, value in unet.state_dict().items()})
    file = read_inference(file.path)
    try:
        from imagen_scale_export.exporter import ExportOptions, export_unet

        # Not compared with the network here: the table does it.
        export_unet(file, ExportOptions(format="onnx", precision="fp32", check=False), say)
    except (ImagenScaleError, ModuleNotFoundError) as error:
        say(f"no export: {error}")
    return file


def say(message: str) -> None:
    """One line for the person watching."""
    click.echo(message, err=True)


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(only: tuple[str, ...], rounds: int, pictures: int) -> str:
    """Every row, in turn; the table and what could not be measured."""
    config = load_config(CONFIG)
    peer = minimagen_unet(json.loads(CONFIG.read_text())["unets"][0])
    size = config.imagen.image_sizes[0]
    generator = torch.Generator().manual_seed(0)
    text = Text(torch.randn(1, 32, 512, generator=generator), torch.ones(1, 32).bool())
    x_t, t = torch.randn(1, 3, size, size, generator=generator), torch.tensor([500])

    schedule = NoiseSchedule.linear(1000)

    def reference() -> Tensor:
        return peer.forward_with_cond_scale(
            x_t, t, text_embeds=text.embeds, text_mask=text.mask, cond_scale=SCALE
        )

    with tempfile.TemporaryDirectory() as folder:
        file = write_run(Path(folder) / "run", peer, config)
        with torch.inference_mode():
            expected, missing = reference(), []
            ready: dict[str, Ready] = {}
            for name, how in ROWS:
                if only and name not in only:
                    continue
                say(name)
                try:
                    runtime = open_runtime(file, torch.device("cpu"), how)
                    denoiser = runtime.bind(Conditioning(text, SCALE))

                    def evaluate(denoiser: Any = denoiser) -> Tensor:
                        return denoiser(x_t, t)

                    first = seconds_of(evaluate)
                    eps = (x_t - schedule.alpha[500] * evaluate()) / schedule.sigma[500]
                    error = (eps - expected).abs().max() / expected.abs().max()
                    ready[name] = Ready(runtime, evaluate, first, error.item())
                except ImagenScaleError as problem:
                    missing.append(f"Not measured: {name}: {problem}")
            evaluations: dict[str, list[float]] = {name: [] for name in ("MinImagen", *ready)}
            for number in range(rounds):
                evaluations["MinImagen"].append(seconds_of(reference))
                for name, row in ready.items():
                    evaluations[name].append(seconds_of(row.evaluate))
                say(f"evaluations: round {number + 1} of {rounds}")
            guided = StageSettings(steps=STEPS, cond_scale=SCALE)
            whole = time_pictures(file, text, ready, pictures, guided)
            few = {
                steps: time_pictures(file, text, ready, pictures, StageSettings(
                    steps=steps, cond_scale=1.0, sampler="ddim", spacing="trailing",
                ))
                for steps in FEW
            }  # fmt: skip
    return page(ready, evaluations, whole, few, [*missing, f"{rounds} rounds; {facts()}"])


def time_pictures(
    file: InferenceFile, text: Text, ready: dict[str, Ready], rounds: int, how: StageSettings
) -> dict[str, float]:
    """Median seconds of a whole picture, by the row's name."""
    stage = Stage(file, torch.device("cpu"))
    own = stage.runtime
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    once = how.model_copy(update={"steps": 1})  # what is compiled or opened first is not counted
    for row in ready.values():
        stage.runtime = row.runtime
        list(stage.parts(Inputs(text, [0]), once))
    for number in range(rounds):
        for name, row in ready.items():
            stage.runtime = row.runtime
            seconds[name].append(seconds_of(lambda: list(stage.parts(Inputs(text, [0]), how))))
        say(f"pictures in {how.steps} steps: round {number + 1} of {rounds}")
    stage.runtime = own
    return {name: statistics.median(times) for name, times in seconds.items()}


def page(
    ready: dict[str, Ready],
    evaluations: dict[str, list[float]],
    pictures: dict[str, float],
    few: dict[int, dict[str, float]],
    notes: list[str],
) -> str:
    """The tables, and what is to be said about them."""
    theirs = evaluations["MinImagen"]
    whole = statistics.median(theirs) * MINIMAGEN_STEPS
    name = f"MinImagen {peers.REQUIREMENTS[0].partition('==')[2]}, fp32, two passes"
    median = f"{statistics.median(theirs):.3f} s"
    rows = [[name, median, "1", "", f"{whole:.0f} s (x {MINIMAGEN_STEPS})", "1", ""]]
    for name, row in ready.items():
        ratio = statistics.median(a / b for a, b in zip(theirs, evaluations[name], strict=True))
        rows.append([
            name, f"{statistics.median(evaluations[name]):.3f} s", f"{ratio:.2f}",
            f"{row.error:.1e}", f"{pictures[name]:.2f} s", f"{whole / pictures[name]:.0f}",
            f"{row.first:.1f} s",
        ])  # fmt: skip
    fast = [
        [name, *(word for seconds in few.values() for word in (
            f"{seconds[name]:.2f} s", f"{whole / seconds[name]:.0f}",
        ))]
        for name in ready
    ]  # fmt: skip
    return "\n\n".join([table(COLUMNS, rows), table(FEW_COLUMNS, fast), *notes])


def facts() -> str:
    """The machine and what counts for speed on it."""
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    wanted = ("onnxruntime", "onnxruntime-gpu", "openvino")
    runtimes = [name for name in wanted if name in installed]
    return f"{torch.get_num_threads()} threads; {machine('torch', *runtimes)}"


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True,
              help="Of single evaluations.")  # fmt: skip
@click.option("--pictures", type=click.IntRange(min=1), default=3, show_default=True,
              help="Rounds of whole pictures.")  # fmt: skip
@click.option(
    "--only", multiple=True, type=click.Choice([name for name, *_ in ROWS]), help="A row."
)
@click.option("--peers", "folder", default=".benchmarks/peers", show_default=True,
              type=click.Path(path_type=Path), help="Where MinImagen is installed.")  # fmt: skip
@write_option(MARK)
@click.option("--inside", "is_inside", is_flag=True, hidden=True)
def main(
    rounds: int, pictures: int, only: tuple[str, ...], folder: Path, write: Path | None,
    is_inside: bool,
) -> None:  # fmt: skip
    """Installs the peers, measures in a process that sees them, prints and writes the table."""
    if write is not None and only:
        raise click.UsageError("--write takes every row; leave out --only.")
    if not is_inside:
        peers.run_inside(folder, __file__)
    text = measure(only, rounds, pictures)
    publish(text, write, MARK)


if __name__ == "__main__":
    main()
