"""A server in a thread of this process, on a run or a bundle, and how callers ask it."""

import base64
import io
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import uvicorn
from PIL import Image

from imagen_scale.commands.listening import listen
from imagen_scale.data.network import LOCALHOST
from imagen_scale.runs.folders import bundle_path
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stages import TrainedStages
from imagen_scale.serving.app import application
from imagen_scale.serving.bundle import ServedBundle
from imagen_scale.serving.contract import ServedCascade
from imagen_scale.serving.engine import Engine
from imagen_scale.serving.limits import Limits
from imagen_scale.serving.run import ServedRun
from imagen_scale.serving.server import hosts_of


class Served:
    """Where it answers, and what works behind it."""

    def __init__(self, engine: Engine, address: str) -> None:
        self.engine, self.address = engine, address
        self.images = f"{address}/v1/images/generations"

    def metric(self, line: str) -> float:
        """A figure of /metrics, by all that stands before it."""
        for told in self.engine.metrics.text().decode().splitlines():
            if told.startswith(f"imagen_scale_{line} "):
                return float(told.rpartition(" ")[2])
        raise KeyError(line)


@contextmanager
def served(
    run: Path, *, works: bool = True, key: str | None = None, limits: Limits = Limits(),  # noqa: B008
    tile: int | None = None, unet_limit: int | None = None, **options: Any,
) -> Iterator[Served]:  # fmt: skip
    """A server until the end of the block.

    Args:
        run: What it serves; a bundle, too.
        works: Whether the engine is started; a test may do so later.
        key: As for `application`.
        limits: As for `application`.
        tile: As for `ServedRun`.
        unet_limit: As for `TrainedStages.load`.
        options: Of the engine.
    """
    cascade: ServedCascade
    if bundle_path(run).is_file():
        cascade = ServedBundle(run, tile=tile, unet_limit=unet_limit)
    else:
        stages = TrainedStages.load(
            run, runtime=RuntimeOptions(runtime="torch"), unet_limit=unet_limit
        )
        cascade = ServedRun(stages, tile=tile)
    engine = Engine(cascade, **{"max_batch": 16, "patience_s": 0.02, "queue": 256} | options)
    app = application(engine, run.name, limits=limits, key=key, hosts=hosts_of(LOCALHOST))
    listener = listen(LOCALHOST, 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    if works:
        engine.start()
    try:
        yield Served(engine, f"http://{LOCALHOST}:{listener.getsockname()[1]}")
    finally:
        if not engine.is_started:
            engine.start()
        engine.drain()
        server.should_exit = True
        thread.join()
        listener.close()


def until(condition: Any, seconds: float = 60) -> None:
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


def client_of(server: Served, key: str = "any") -> openai.OpenAI:
    """OpenAI's client of a server."""
    return openai.OpenAI(
        base_url=f"{server.address}/v1", api_key=key, max_retries=0,
        http_client=httpx.Client(trust_env=False, timeout=120),
    )  # fmt: skip


def ask(server: Served, **body: Any) -> httpx.Response:
    """Asks for pictures and waits."""
    return httpx.post(server.images, json=body, trust_env=False, timeout=120)


def pixels(b64: str) -> np.ndarray:
    """What an answer's `b64_json` shows, (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64)))).astype(int)


def assert_alike(b64: str, image: Image.Image) -> None:
    """Equal but for the last bits that company may move: one level."""
    assert np.abs(pixels(b64) - np.asarray(image).astype(int)).max() <= 1


def assert_computed_together(folder: Path, asked: Sequence[dict[str, Any]], cascade: Any) -> None:
    """Six requests, three of a kind and three alone, get the pictures that they get by themselves.

    Args:
        folder: Of the run or the bundle that is served.
        asked: What is asked for; prompts are taken out.
        cascade: Draws them by itself.
    """
    with served(folder, works=False) as server, ThreadPoolExecutor() as callers:
        answers = [callers.submit(ask, server, **one) for one in asked]
        until(lambda: len(server.engine.waiting) == len(asked))
        server.engine.start()
        data = [answer.result().json()["data"] for answer in answers]
        assert server.metric("batch_pictures_count") == 4
        assert server.metric('batch_pictures_bucket{le="1.0"}') == 3
        assert server.metric("batch_pictures_sum") == len(asked)
    for one, (made,) in zip(asked, data, strict=True):
        (image,) = cascade.sample(one.pop("prompt"), **one)
        assert_alike(made["b64_json"], image)
