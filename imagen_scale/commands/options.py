"""Options that several commands share."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

run_option = click.option("--run", help="Folder of the run; default the newest under runs/.")
seed_option = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Same seed, same picture.",
)
unfinished_option = click.option(
    "--allow-unfinished", is_flag=True, help="Accept stages whose training has not ended."
)


class PerStage(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """One value, or one per stage separated by commas."""

    def __init__(self, item: Any) -> None:
        self.item = item
        self.name = item.name

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """What the help shows."""
        return f"{self.name.upper()}[,...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """A value, or a list where there is a comma."""
        if not isinstance(value, str):
            return value
        values = [self.item.convert(part.strip(), param, ctx) for part in value.split(",")]
        return values if len(values) > 1 else values[0]

    def shell_complete(self, ctx: click.Context, param: Any, incomplete: str) -> list[Any]:
        """What the value after the last comma may be."""
        before, comma, last = incomplete.rpartition(",")
        found = self.item.shell_complete(ctx, param, last)
        for item in found:
            item.value = f"{before}{comma}{item.value}"
        return found


# The names stand in imagen_scale.diffusion and sampling.runtimes.contract, which load torch.
SAMPLER_NAMES = ("ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun")
SPACING_NAMES = ("linear", "trailing", "logsnr", "karras")
RUNTIME_NAMES = ("auto", "torch", "compile", "onnx", "tensorrt", "openvino")

SETTING_OPTIONS = (
    click.option(
        "--steps", type=PerStage(click.IntRange(min=1)), help="Steps per stage; default 25."
    ),
    click.option(
        "--cond-scale",
        type=PerStage(click.FLOAT),
        help="Guidance; a single value is the base stage's, the others take 1. Default 3.",
    ),
    click.option(
        "--sampler",
        type=PerStage(click.Choice(SAMPLER_NAMES)),
        help=f"One of {', '.join(SAMPLER_NAMES)}; default dpmpp_2m.",
    ),
    click.option(
        "--spacing",
        type=PerStage(click.Choice(SPACING_NAMES)),
        help=f"Which times are visited: {', '.join(SPACING_NAMES)}.",
    ),
    click.option("--eta", type=PerStage(click.FLOAT), help="Noise of --sampler ddim, 0 to 1."),
    click.option(
        "--threshold",
        type=PerStage(click.FLOAT),
        help="Percentile of dynamic thresholding, 0 to 1; default the configuration's.",
    ),
)
RUNTIME_OPTIONS = (
    click.option(
        "--runtime",
        type=click.Choice(RUNTIME_NAMES),
        default="auto",
        show_default=True,
        help="What computes the U-Nets; auto says what it took and why.",
    ),
    click.option(
        "--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Default by the device."
    ),
    click.option("--channels-last", is_flag=True, help="Memory layout for torch."),
    click.option(
        "--sequential", is_flag=True, help="Two passes for guidance: less memory, more time."
    ),
)


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """What all commands that sample take; settings that are not given are left out."""

    @wraps(command)
    def wrapped(**options: Any) -> None:
        names = ("steps", "cond_scale", "sampler", "spacing", "eta", "threshold")
        given = {name: options.pop(name) for name in names}
        how = {name: options.pop(name) for name in ("precision", "channels_last", "sequential")}
        settings = {name: value for name, value in given.items() if value is not None}
        command(settings=settings, how=how, **options)

    for option in reversed((*SETTING_OPTIONS, *RUNTIME_OPTIONS)):
        wrapped = option(wrapped)
    return wrapped
