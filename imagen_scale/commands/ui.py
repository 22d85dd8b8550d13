"""`imagen-scale ui`."""

import os
import sys
from typing import Any

import click

from imagen_scale.commands.errors import user_errors


@click.command(short_help="Sample in a page of the browser.")
@click.option("--run", help="Folder of the run; default the newest under runs/.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True,
              help="On 127.0.0.1; 0 takes any that is free.")  # fmt: skip
@click.option(
    "--runtime",
    type=click.Choice(["auto", "torch", "compile", "onnx", "tensorrt", "openvino"]),
    default="auto",
    show_default=True,
    help="What computes the U-Nets at first; the page can change it.",
)
@click.option("--unet-limit", type=int, help="Stop after this U-Net.")
@click.option(
    "--allow-unfinished", is_flag=True, help="Accept stages whose training has not ended."
)
@click.option(
    "--open/--no-open", "opens", default=None, help="Show it; default where there is a display."
)
@user_errors
def ui(
    run: str | None,
    port: int,
    runtime: Any,
    unet_limit: int | None,
    allow_unfinished: bool,
    opens: bool | None,
) -> None:
    """Sample a run in a page: prompts, settings, both stages as they denoise, the history.

    It answers on this machine alone and fetches nothing. What it makes lies in the run's samples/,
    as `imagen-scale sample` would leave it.

    \b
        imagen-scale ui
        imagen-scale ui --run runs/emoji_demo --port 0 --no-open
    """
    from imagen_scale.ui.server import listen, require_gradio, serve

    require_gradio()
    from imagen_scale.runs.folders import find_run
    from imagen_scale.ui.page import Opened

    folder = find_run(run)
    listener = listen(port)
    serve(
        Opened(folder, runtime, unet_limit, allow_unfinished),
        listener,
        opens=_has_display() if opens is None else opens,
        say=lambda sentence: click.echo(sentence, err=True),
    )


def _has_display() -> bool:
    """Whether a browser opens as a window, not inside the terminal."""
    return sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
