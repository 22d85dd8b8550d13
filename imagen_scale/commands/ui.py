"""`imagen-scale ui`."""

import os
import sys
from typing import Any

import click

from imagen_scale.commands.console import say
from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.listening import listen
from imagen_scale.commands.options import (
    run_option,
    runtime_option,
    unet_limit_option,
    unfinished_option,
)


@click.command(short_help="Sample in a page of the browser.")
@run_option
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True,
              help="On 127.0.0.1; 0 takes any that is free.")  # fmt: skip
@runtime_option
@unet_limit_option
@unfinished_option
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
    from imagen_scale.data.network import LOCALHOST
    from imagen_scale.ui.server import require_gradio, serve

    require_gradio()
    from imagen_scale.runs.folders import find_run
    from imagen_scale.ui.page import Opened

    folder = find_run(run)
    listener = listen(LOCALHOST, port)
    serve(
        Opened(folder, runtime or "auto", unet_limit, allow_unfinished),
        listener,
        opens=_has_display() if opens is None else opens,
        say=say,
    )


def _has_display() -> bool:
    """Whether a browser opens as a window, not inside the terminal."""
    return sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
