"""The page over HTTP, for this machine alone: nothing is fetched from elsewhere or sent there."""

import os
import socket
import tempfile
import webbrowser
from collections.abc import Callable
from contextlib import closing
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from imagen_scale.data.network import LOCALHOST, without_proxies
from imagen_scale.errors import MissingExtraError

if TYPE_CHECKING:
    from imagen_scale.ui.page import Opened

# Gradio's own scripts are inline, compile templates and draw what they made themselves; nothing
# may come from another address.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'"
)
SYSTEM_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
SYSTEM_MONO = ("ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def require_gradio() -> None:
    """Imports gradio with all of its reporting turned off.

    Raises:
        MissingExtraError: If it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        with without_proxies():  # it opens clients at once, though the page fetches nothing
            import gradio
            import uvicorn
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the page needs gradio, and this installation lacks {error.name}; run "
            f"pip install 'imagen-scale[ui]'."
        ) from None
    assert gradio and uvicorn


def serve(
    run: "Opened", listener: socket.socket, *, opens: bool, say: Callable[[str], None]
) -> None:
    """Serves the page until it is interrupted.

    Args:
        run: What is sampled.
        listener: Closed at the end.
        opens: Show it in the browser.
        say: Told the address.
    """
    import uvicorn

    address = f"http://{LOCALHOST}:{listener.getsockname()[1]}"
    with closing(listener), tempfile.TemporaryDirectory(prefix="imagen-scale-ui-") as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache
        app, halt_all = application(run)
        # What streams to a browser that stays open is cut after two seconds.
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        shut_down = server.handle_exit

        def handle_exit(number: int, frame: Any) -> None:
            halt_all()
            shut_down(number, frame)

        server.handle_exit = handle_exit
        say(f"{run.folder} at {address}; Ctrl-C ends it")
        if opens:
            webbrowser.open(address)
        server.run(sockets=[listener])


def application(run: "Opened") -> tuple[Any, Callable[[], None]]:
    """The page as an ASGI application, and what ends its work."""
    require_gradio()
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from imagen_scale.ui.page import Page

    page = Page(run)
    blocks = page.build()
    gr.set_static_paths([page.samples])  # served where they lie, not copied
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=SYSTEM_FONT, font_mono=SYSTEM_MONO
    )
    app = FastAPI(openapi_url=None)
    # A page elsewhere whose name is made to point here is not answered.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[LOCALHOST, "localhost"])

    app.add_middleware(_Policy)
    gr.mount_gradio_app(
        app, blocks, path="/", server_name=LOCALHOST, footer_links=[], run_history=False,
        ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, theme=theme,
        css=(files("imagen_scale.ui") / "page.css").read_text(encoding="utf-8"),
    )  # fmt: skip
    return app, page.halt_all


class _Policy:
    """Adds `POLICY` to every answer; streams pass as they are."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await self.app(scope, receive, send_with_policy)
