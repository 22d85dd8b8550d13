"""The server over HTTP, from the first stage that loads to the last picture it owes."""

import os
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

from imagen_scale.data.network import LOCALHOST
from imagen_scale.errors import MissingExtraError
from imagen_scale.version import __version__

if TYPE_CHECKING:
    from imagen_scale.serving.engine import Engine

KEY_VARIABLE = "IMAGEN_SCALE_API_KEY"
LOOPBACK = (LOCALHOST, "localhost", "::1")
NAMES = [LOCALHOST, "localhost", "[::1]"]  # of it, as a request spells them
FAREWELL_S = 30  # how long an answer that is ready may take to be read, once all work is done


def require_extra() -> None:
    """Imports what a server needs.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"serving needs FastAPI, uvicorn and prometheus-client, and this installation lacks "
            f"{error.name}; run pip install 'imagen-scale[serve]'."
        ) from None
    assert fastapi and prometheus_client and uvicorn


def require_runtime() -> None:
    """Imports what draws a bundle.

    Raises:
        MissingExtraError: If it is not installed, or of another version than this package.
    """
    try:
        import imagen_scale_runtime
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"a bundle is drawn by the distribution imagen-scale-runtime, and this installation "
            f"lacks {error.name}; run pip install ./export/runtime in imagen-scale's repository."
        ) from None
    if imagen_scale_runtime.__version__ != __version__:
        raise MissingExtraError(
            f"a bundle is drawn by the distribution imagen-scale-runtime, and this installation "
            f"has its version {imagen_scale_runtime.__version__} beside imagen-scale "
            f"{__version__}; run pip install ./export/runtime in imagen-scale's repository."
        )


def api_key() -> str | None:
    """The key that callers must know; None if the environment holds none."""
    return os.environ.get(KEY_VARIABLE, "").strip() or None  # a file of secrets ends in a newline


def hosts_of(host: str) -> list[str] | None:
    """The names by which a server is addressed that listens at a host; None for any."""
    return NAMES if host in LOOPBACK else None


def serve(
    engine: "Engine", app: Any, listener: socket.socket, *, say: Callable[[str], None]
) -> None:
    """Serves until SIGTERM or SIGINT; what was accepted by then is finished first.

    Meanwhile it still answers, with 503 to new work. A second signal gives up what is not finished.

    Args:
        engine: Not started yet.
        app: From `application`.
        listener: Closed at the end.
        say: Told when it drains.

    Raises:
        ImagenScaleError: If the stages cannot be loaded, or the engine came to an end of its own.
        KeyboardInterrupt: After a second signal.
    """
    import uvicorn

    from imagen_scale.serving.engine import ended_by

    config = uvicorn.Config(
        app, log_level="error", access_log=False, lifespan="off", server_header=False,
        timeout_graceful_shutdown=FAREWELL_S,
    )  # fmt: skip
    server = uvicorn.Server(config)
    signals: list[int] = []

    def drain() -> None:
        say("finishing what was accepted; a second signal gives it up")
        engine.drain()
        server.should_exit = True

    def handle_exit(number: int, frame: Any) -> None:
        signals.append(number)
        if len(signals) == 1:
            threading.Thread(target=drain, daemon=True).start()
        else:
            threading.Thread(target=engine.stop, daemon=True).start()  # then `drain` is done

    def watch() -> None:
        """Ends the server where nothing can be served: whoever supervises it starts another."""
        engine.join()
        if engine.failure is not None:
            server.should_exit = True

    server.handle_exit = handle_exit
    engine.start()
    threading.Thread(target=watch, daemon=True).start()
    with closing(listener):
        server.run(sockets=[listener])
    if len(signals) > 1:
        raise KeyboardInterrupt
    if engine.failure is not None:
        raise ended_by(engine.failure)
