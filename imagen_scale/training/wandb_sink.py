"""Weights & Biases beside a run: whatever it does, training neither waits nor stops for it.

It lives in a thread, and its own process is killed at the end if it does not finish: `wandb.init`
may wait for 90 s, and its exit hook for ever.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from imagen_scale.config import Config
from imagen_scale.errors import ConfigError, MissingExtraError
from imagen_scale.runs.folders import unet_dir

WAITING = 1000  # rows kept while wandb takes none
CLOSE_S = 30.0  # what it gets to finish in


class WandbSink:
    """Hands rows and pictures to wandb in a thread of its own.

    Every call of wandb may block: starting takes 90 s where its server cannot be reached. Rows
    that it is too slow for are dropped for wandb only, and counted; after an error it gets nothing
    more. `metrics.jsonl` has every row in any case.

    Args:
        run_dir: The run's folder.
        config: The run's configuration, with `logging.wandb`.
        unet_number: 1-based.
        say: Told, once each, of what goes wrong.

    Raises:
        MissingExtraError: If wandb is not installed.
        ConfigError: If wandb refuses a setting, or has no key for its server.
    """

    def __init__(
        self, run_dir: Path, config: Config, unet_number: int, say: Callable[[str], None]
    ) -> None:
        self.say = say
        self.dropped = 0
        self._is_dead, self._is_asked_to_end = False, False
        self._sendings: queue.Queue[Callable[[Any], object] | None] = queue.Queue(WAITING)
        options = _options(run_dir, config, unet_number)
        self._thread = threading.Thread(
            target=self._work, args=(options,), name="wandb", daemon=True
        )
        self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """Sends a row, some time."""
        self._put(lambda run: run.log(row))

    def picture(self, row: dict[str, Any], name: str, path: Path) -> None:
        """Sends a row with a picture under `name`."""
        import wandb

        self._put(lambda run: run.log(row | {name: wandb.Image(str(path))}))

    def close(self) -> None:
        """Waits for wandb to finish, for a bounded time."""
        deadline = time.monotonic() + CLOSE_S
        if not self._is_dead and not self._ends_by(time.monotonic() + CLOSE_S / 10):
            self.say(f"waiting for wandb to finish, {CLOSE_S:.0f} s at most")
            if not self._ends_by(deadline) and not self._is_dead:
                self._is_dead = True  # what it fails with from now on is our doing
                self.say(
                    f"WARNING: wandb did not finish in {CLOSE_S:.0f} s and is left; "
                    f"metrics.jsonl has every row. Is its server reachable? "
                    f"logging.wandb.mode offline needs none."
                )
        if self._is_dead:
            _end_service()
        if self.dropped:
            self.say(f"WARNING: wandb lacks {self.dropped} rows; metrics.jsonl has them")

    def _ends_by(self, deadline: float) -> bool:
        """Waits for the thread to do what is left; tells whether it did."""
        if not self._is_asked_to_end:
            with contextlib.suppress(queue.Full):
                self._sendings.put(None, timeout=max(0.0, deadline - time.monotonic()))
                self._is_asked_to_end = True
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _put(self, send: Callable[[Any], object]) -> None:
        if self._is_dead:
            return
        try:
            self._sendings.put_nowait(send)
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                self.say(
                    f"WARNING: wandb has not taken the last {WAITING} rows; more are dropped for "
                    f"wandb only, metrics.jsonl has them"
                )

    def _work(self, options: dict[str, Any]) -> None:
        import wandb

        try:
            run = wandb.init(**options)
            while (send := self._sendings.get()) is not None:
                send(run)
            run.finish()
        # Whatever a service of others throws. Its words are not repeated: an address in them may
        # hold a password.
        except BaseException as error:
            if not self._is_dead:
                self._is_dead = True
                self.say(
                    f"WARNING: wandb failed ({type(error).__name__}) and gets nothing more; "
                    f"metrics.jsonl has every row. Its own words are in {options['dir']}/wandb."
                )


def _options(run_dir: Path, config: Config, unet_number: int) -> dict[str, Any]:
    """What `wandb.init` is called with, checked without the network."""
    settings = config.logging.wandb
    assert settings is not None
    try:
        import wandb
    except ImportError:
        raise MissingExtraError(
            "logging.wandb is set, but wandb is not installed. Install it with "
            "`pip install 'imagen-scale[wandb]'`, or set logging.wandb to null."
        ) from None
    try:
        wandb.Settings(project=settings.project, entity=settings.entity, mode=settings.mode)
    except (ValueError, wandb.errors.UsageError) as error:
        raise ConfigError(f"logging.wandb: wandb refuses it: {error}") from None
    if settings.mode == "online" and not _has_key():
        raise ConfigError(
            "logging.wandb: wandb has no key for its server. Run `wandb login`, set "
            "WANDB_API_KEY, or set logging.wandb.mode to offline."
        )
    # The same id at each start, so that a resumed run continues its own curves.
    id_file = unet_dir(run_dir, unet_number) / "wandb_id.txt"
    if not id_file.is_file():
        id_file.write_text(os.urandom(4).hex())
    return {
        "project": settings.project,
        "entity": settings.entity,
        "mode": settings.mode,
        "id": id_file.read_text(),
        "resume": "allow",
        "name": f"{run_dir.name}-unet{unet_number}",
        "dir": str(run_dir),
        "config": config.model_dump(mode="json"),
    }


def _has_key() -> bool:
    """Whether wandb would start without asking for a key; the network is left alone."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import requests
    import wandb

    settings = wandb.setup().settings
    return bool(settings.api_key or requests.utils.get_netrc_auth(settings.base_url))


def _end_service() -> None:
    """Ends wandb's own process, which this process would wait for at its end, maybe for ever."""
    import wandb

    for child in psutil.Process().children():
        if child.name().startswith("wandb-core"):
            child.kill()
    with contextlib.suppress(Exception, SystemExit):  # it misses the process just killed
        wandb.teardown()
