"""Storm on Weights & Biases: out of reach, silent, failing, killed; what it costs a training."""

import functools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from forked import Training
from interruptions import losses
from support.environment import reserved_port
from support.tiny import TINY

KEY = "0123456789abcdef0123456789abcdef01234567"
STEPS, BATCH, EVERY = 250, 16, 10  # EVERY steps a report, five times as often as by default
WARM = 80  # steps that are not timed: about ten seconds, in which wandb is imported and started


@contextmanager
def nobody() -> Iterator[str]:
    """An address that refuses connections."""
    with reserved_port() as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def silence() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def refusal() -> Iterator[str]:
    """A server that answers each call with an error 501."""
    with reserved_port() as port:
        command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


OUTAGES = {"killed": None, "out of reach": nobody, "silent": silence, "failing": refusal}


def configuration(folder: Path, mode: str | None) -> Path:
    """A training whose steps are long enough to be timed."""
    unets = [{**TINY["unets"][0], "dim": 32}, TINY["unets"][1]]
    calm = {"val_every": 1000, "sample_every": 1000, "checkpoint_every": 1000}
    training = TINY["training"] | calm | {"steps": STEPS, "global_batch": BATCH}
    logging = {"log_every": EVERY, "wandb": mode and {"project": "storm", "mode": mode}}
    path = folder / f"{mode}.json"
    path.write_text(json.dumps(TINY | {"unets": unets, "training": training, "logging": logging}))
    return path


def train(folder: Path, run: Path, outage: str | None) -> tuple[float, list[str]]:
    """One training, and what happens to its tracker.

    Returns:
        Seconds of a step, and what should not have been.
    """
    mode = outage and ("offline" if outage == "killed" else "online")
    make = OUTAGES.get(outage) or nobody
    with make() as address:
        config = configuration(folder, mode)
        training = Training(
            ["--config", str(config), "--run", str(run), "--unet", "1"],
            1, folder / "log.txt", functools.partial(user_of_wandb, folder, address),
        )  # fmt: skip
        was_killed = outage == "killed" and kill_tracker(training)
        (code,) = training.end()
    said = training.said()
    rows = losses(run)
    found = [f"ended with {code}"] * (code != 0) + ["a traceback"] * ("Traceback" in said)
    found += ["its key is printed"] * (KEY in said)
    found += ["wandb was not killed"] * (outage == "killed" and not was_killed)
    found += ["nobody said that wandb failed"] * (bool(outage) and "WARNING: wandb " not in said)
    if [step for step, _ in rows] != list(range(EVERY, STEPS + 1, EVERY)):
        found.append("metrics.jsonl lacks rows")
    return step_seconds(run), [f"{one}: {said[-500:]}" for one in found]


def user_of_wandb(home: Path, address: str) -> None:
    """Makes this process one of somebody with nothing but a key."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ |= {"WANDB_BASE_URL": address, "WANDB_API_KEY": KEY, "HOME": str(home)}


def kill_tracker(training: Training) -> bool:
    """Ends wandb's own process when it has run for a while; tells whether it was there."""

    def trackers() -> list[psutil.Process]:
        children = psutil.Process(training.pids[0]).children(recursive=True)
        return [child for child in children if child.name().startswith("wandb")]

    if not training.until(lambda: bool(trackers()), 0.05):
        return False
    time.sleep(1)
    victims = trackers()
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    return bool(victims)


def step_seconds(run: Path) -> float:
    """Seconds of a step: the lower quartile of the reports, since what else disturbs only adds."""
    lines = map(json.loads, (run / "unet1" / "metrics.jsonl").read_text().splitlines())
    speeds = [row["images_per_s"] for row in lines if row["step"] > WARM and "loss" in row]
    return BATCH / statistics.quantiles(speeds, n=4)[-1]


def trackers(trials: int, folder: Path) -> tuple[list[str], str]:
    """Each trial is two trainings in turn, without wandb and with one that is not well."""
    failures, ratios = [], []
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for trial in range(trials):
        outage = list(OUTAGES)[trial % len(OUTAGES)]
        runs = {None: folder / f"without_{trial}", outage: folder / f"with_{trial}"}
        order: list[str | None] = [None, outage]
        for kind in order[:: 1 if trial // len(OUTAGES) % 2 else -1]:
            taken, found = train(folder, runs[kind], kind)
            seconds[kind is not None].append(taken)
            failures += [f"{kind or 'without'}: {one}" for one in found]
        if losses(runs[None]) != losses(runs[outage]):
            failures.append(f"{outage}: other losses")
        ratios.append(seconds[True][-1] / seconds[False][-1])
    kinds = ", ".join(list(OUTAGES)[:trials])
    return failures, (
        f"{kinds}: {trials} trainings ended as those without, every row in metrics.jsonl; a step "
        f"takes {statistics.median(ratios) - 1:+.1%} (median of {trials} pairs, steps of "
        f"{1000 * statistics.median(seconds[False]):.0f} ms, a report every {EVERY})"
    )
