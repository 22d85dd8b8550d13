"""A server in a thread of this process, on a run that a test made."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from imagen_scale.commands.listening import listen
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stages import TrainedStages
from imagen_scale.serving.app import application
from imagen_scale.serving.engine import Engine
from imagen_scale.serving.limits import Limits
from imagen_scale.serving.server import hosts_of

HOST = "127.0.0.1"


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
    **options: Any,
) -> Iterator[Served]:  # fmt: skip
    """A server until the end of the block.

    Args:
        run: What it serves.
        works: Whether the engine is started; a test may do so later.
        key: As for `application`.
        limits: As for `application`.
        options: Of the engine.
    """
    stages = TrainedStages.load(run, runtime=RuntimeOptions(runtime="torch"))
    engine = Engine(stages, **{"max_batch": 16, "patience_s": 0.02, "queue": 256} | options)
    app = application(engine, run.name, limits=limits, key=key, hosts=hosts_of(HOST))
    listener = listen(HOST, 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    if works:
        engine.start()
    try:
        yield Served(engine, f"http://{HOST}:{listener.getsockname()[1]}")
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
