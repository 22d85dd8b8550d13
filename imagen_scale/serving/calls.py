"""A request on its way: its pictures in the engine, its caller on the line."""

import asyncio
import base64
import io
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from PIL import Image

from imagen_scale.serving.contract import Drawn
from imagen_scale.serving.engine import Engine
from imagen_scale.serving.refusal import refusal_of
from imagen_scale.serving.request import Asked
from imagen_scale.serving.waiting import Event, Failed, Job, Made, Step

Receive = Callable[[], Awaitable[Any]]


class GoneError(Exception):
    """The caller has gone away."""


class Call:
    """The pictures of one request.

    Args:
        engine: Makes them; accepts them here.
        asked: Which ones.

    Raises:
        Refusal: If they are not accepted.
    """

    def __init__(self, engine: Engine, asked: Asked) -> None:
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._heard: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._jobs = [
            Job(wanted, asked.kind, self._teller(index), asked.streams)
            for index, wanted in enumerate(asked.wanted)
        ]
        engine.submit(self._jobs)

    def _teller(self, index: int) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                self._loop.call_soon_threadsafe(self._heard.put_nowait, (index, event))

        return tell

    async def events(self, receive: Receive) -> AsyncGenerator[tuple[int, Step | Made], None]:
        """What happens to each picture, by its index, until all are made; steps if it streams.

        Args:
            receive: ASGI's, with the body read: it tells when the caller goes away.

        Raises:
            GoneError: If the caller has gone away; what was not begun is dropped.
            Refusal: If one cannot be made; so it is with the others.
        """
        gone = asyncio.ensure_future(_gone(receive))
        left = len(self._jobs)
        try:
            while left:
                heard = asyncio.ensure_future(self._heard.get())
                try:
                    await asyncio.wait({heard, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if not heard.done():
                        raise GoneError
                    index, event = heard.result()
                finally:
                    heard.cancel()
                if isinstance(event, Failed):
                    raise refusal_of(event.error)
                left -= isinstance(event, Made)
                yield index, event
        finally:
            gone.cancel()
            self.end()

    def end(self) -> None:
        """Nobody waits for it any more; what was not begun never is."""
        self._engine.drop(self._jobs)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def datum(picture: Drawn) -> dict[str, Any]:
    """A picture as an answer holds it: OpenAI's key, and what it was made from."""
    return {
        "b64_json": await asyncio.to_thread(_png, picture.image),
        "seed": picture.seed,
        "not_read": [lost._asdict() for lost in picture.not_read],
    }


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
