"""How long a whole picture of a cascade takes, beside MinImagen's published package.

\b
    python benchmarks/cascade_sampling.py
    python benchmarks/cascade_sampling.py --write docs/sampling.md

The cascade of configs/pokemon_64_256.json, 64 and 256 px, equal networks and weights, random ones
that MinImagen's class made. One evaluation of each stage of each variant in turn, round after
round; a picture is evaluations times their medians: MinImagen's guided in two passes, 1000 steps a
stage; ours 25 steps a stage, the base guided, or 4 + 2 evaluations as stages take them that were
taught to (`imagen-scale distill`). Text, thresholding and solver are not counted.
"""  # noqa: D301 - click reads the backspace

import inspect
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import peers
import torch
from report import publish, table, write_option
from sampling import facts, minimagen_unet, say, seconds_of, write_run
from torch import Tensor

from imagen_scale.config import StageConfig, load_config
from imagen_scale.errors import ImagenScaleError
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.runtimes.contract import Conditioning, Text
from imagen_scale.sampling.runtimes.opening import open_runtime
from imagen_scale.sampling.runtimes.options import RuntimeOptions

CONFIG = peers.ROOT / "configs" / "pokemon_64_256.json"
MARK = "cascade_speed"
SCALE, MINIMAGEN_STEPS, STEPS, FEW = 3.0, 1000, 25, (4, 2)
RUNTIMES = {"torch, fp32": "torch", "ONNX Runtime, fp32": "onnx"}
Evaluations = dict[tuple[str, int, bool], list[float]]  # by who, U-Net and whether guided


def peer_unet(stage: StageConfig) -> Any:
    """MinImagen's own U-Net of a stage, on random weights of which none is zero."""
    unet_class, _ = peers.import_unets()
    network = vars(stage.network)
    taken = inspect.signature(unet_class).parameters
    return minimagen_unet({name: network[name] for name in taken if name in network})


def calls(
    stage: StageConfig, unet: Any, file: InferenceFile
) -> dict[tuple[str, bool], Callable[[], Tensor]]:
    """One evaluation of a stage in every way that works here, by who and whether guided."""
    size, generator = stage.size, torch.Generator().manual_seed(0)
    text = Text(torch.randn(1, 32, 512, generator=generator), torch.ones(1, 32).bool())
    x_t = torch.randn(1, 3, size, size, generator=generator)
    t = torch.tensor([500])
    given: dict[str, Any] = {}
    low: dict[str, Any] = {}
    if stage.is_super_resolution:
        lowres = torch.rand(1, 3, size, size, generator=generator) * 2 - 1
        given = {"lowres_cond_img": lowres, "lowres_noise_times": torch.tensor([20])}
        low = {"lowres_img": lowres, "lowres_t": torch.tensor([20])}

    def peer() -> Tensor:
        return unet.forward_with_cond_scale(
            x_t, t, text_embeds=text.embeds, text_mask=text.mask, cond_scale=SCALE, **given
        )

    found: dict[tuple[str, bool], Callable[[], Tensor]] = {("MinImagen", True): peer}
    for name, kind in RUNTIMES.items():
        try:
            how = RuntimeOptions.make(runtime=kind, precision="fp32")
            runtime = open_runtime(file, torch.device("cpu"), how)
        except ImagenScaleError as error:
            say(f"not measured: {name}: {error}")
            continue
        for scale in (SCALE, 1.0):
            denoise = runtime.bind(Conditioning(text, scale, **low))
            found[name, scale != 1] = lambda denoise=denoise: denoise(x_t, t)
    return found


def measure(rounds: int) -> Evaluations:
    """Seconds of single evaluations, each in turn."""
    config = load_config(CONFIG, ("training.recipe=null",))
    seconds: Evaluations = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for stage in config.stages(512):
            with torch.inference_mode(False):
                unet = peer_unet(stage)
                file = write_run(Path(folder) / "run", unet, config, stage.number)
            ways = calls(stage, unet, file)
            for call in ways.values():
                call()  # the first is slower
            for number in range(rounds):
                for (who, is_guided), call in ways.items():
                    found = seconds.setdefault((who, stage.number, is_guided), [])
                    found.append(seconds_of(call))
                say(f"{stage.name}: round {number + 1} of {rounds}")
    return seconds


def page(seconds: Evaluations, rounds: int) -> str:
    """The table, and what it was measured on."""

    def one(who: str, number: int, is_guided: bool) -> float:
        return statistics.median(seconds[who, number, is_guided])

    theirs = MINIMAGEN_STEPS * (one("MinImagen", 1, True) + one("MinImagen", 2, True))
    rows = [[f"MinImagen {peers.REQUIREMENTS[0].partition('==')[2]}, fp32", "2000 + 2000",
             _told(theirs), "1"]]  # fmt: skip
    for name in RUNTIMES:
        if (name, 2, False) not in seconds:
            continue
        usual = STEPS * (one(name, 1, True) + one(name, 2, False))
        few = FEW[0] * one(name, 1, False) + FEW[1] * one(name, 2, False)
        for evaluations, whole in ((f"{2 * STEPS} + {STEPS}", usual), ("4 + 2", few)):
            rows.append([name, evaluations, _told(whole), f"{theirs / whole:.0f}"])
    columns = ("64 -> 256 px", "evaluations", "a picture", "times MinImagen")
    return f"{table(columns, rows)}\n\n{rounds} rounds, medians; {facts()}"


def _told(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds:.1f} s"


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--peers", "folder", default=".benchmarks/peers", show_default=True,
              type=click.Path(path_type=Path), help="Where MinImagen is installed.")  # fmt: skip
@write_option(MARK)
@click.option("--inside", "is_inside", is_flag=True, hidden=True)
def main(rounds: int, folder: Path, write: Path | None, is_inside: bool) -> None:
    """Installs the peers, measures in a process that sees them, prints and writes the table."""
    if not is_inside:
        peers.run_inside(folder, __file__)
    text = page(measure(rounds), rounds)
    publish(text, write, MARK)


if __name__ == "__main__":
    main()
