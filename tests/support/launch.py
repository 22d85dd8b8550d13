"""Trainings: launch/train.py on some ranks, forked or under the real launchers."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from support import ROOT
from support.environment import rank_variables, reserved_port, without_launcher
from support.forker import fork

PATIENCE = 400  # seconds after which a training that has not ended never will


def launch(
    config: Path,
    run_dir: Path,
    *options: str,
    processes: int = 1,
    plain: bool = False,
    real: bool = False,
    check: bool = True,
    env: dict[str, str] | None = None,
    kill_at: str | None = None,
    kill_with: signal.Signals = signal.SIGKILL,
    script: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs launch/train.py to its end.

    Args:
        config: JSON file of the run.
        run_dir: Folder of the run.
        options: Flags with their numbers, and settings as `key=value`.
        processes: Ranks.
        plain: As plain python starts it, without a launcher's variables.
        real: By the deepspeed launcher or python itself; otherwise each rank is a fork of a process
            that has imported everything.
        check: Fail if it fails.
        env: Changes to the environment.
        kill_at: Name in a stage's folder at whose appearance all processes get a signal.
        kill_with: That signal.
        script: Program that changes something and then runs its arguments.
    """
    flags = [option for option in options if option.startswith("--") or option.isdigit()]
    settings = [f"--set={option}" for option in options if option not in flags]
    argv = [
        *([str(script)] if script else []), str(ROOT / "launch" / "train.py"),
        "--config", str(config), "--run", str(run_dir), *flags, *settings,
    ]  # fmt: skip
    environment = without_launcher() | {"OMP_NUM_THREADS": "1"} | (env or {})
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with (
        reserved_port() as port,
        tempfile.TemporaryFile("w+") as stdout,
        tempfile.TemporaryFile("w+") as stderr,
    ):
        if real:
            launcher = [] if plain else [
                str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators",
                str(processes), "--master_port", str(port),
            ]  # fmt: skip
            pids, codes = _start(launcher or [sys.executable], argv, environment, stdout, stderr)
        else:
            each = [environment] if plain else [
                environment | rank_variables(rank, processes, port) for rank in range(processes)
            ]  # fmt: skip
            pids, codes = _fork(argv, each, stdout, stderr)
        deadline = time.monotonic() + PATIENCE
        try:
            if kill_at is not None:
                while None in codes() and not list(Path(run_dir).glob(f"*/{kill_at}")):
                    time.sleep(0.005)
                _send(kill_with, pids)  # as a terminal and SLURM do
            while None in codes():
                if time.monotonic() > deadline:
                    pytest.fail(f"{' '.join(argv)} does not end")
                time.sleep(0.01)
        finally:
            _send(signal.SIGKILL, pids)
        said = [stream.seek(0) or stream.read() for stream in (stdout, stderr)]
    code = next(filter(None, codes()), 0)
    if check and kill_at is None and code:
        pytest.fail(f"{' '.join(argv)}\n{said[0][-4000:]}\n{said[1][-4000:]}")
    return subprocess.CompletedProcess(argv, code, *said)


Codes = Callable[[], list[int | None]]  # exit codes, None of what runs


def _start(
    launcher: list[str], argv: list[str], environment: dict[str, str], stdout: IO, stderr: IO
) -> tuple[list[int], Codes]:
    process = subprocess.Popen(
        [*launcher, *argv], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stdout,
        stderr=stderr, start_new_session=True,
    )  # fmt: skip
    return [process.pid], lambda: [process.poll()]


def _fork(
    argv: list[str], environments: list[dict[str, str]], stdout: IO, stderr: IO
) -> tuple[list[int], Codes]:
    ranks = [fork(argv, each, stdout=stdout, stderr=stderr) for each in environments]
    return [rank.pid for rank in ranks], lambda: [rank.exitcode for rank in ranks]


def _send(signum: signal.Signals, leaders: list[int]) -> None:
    """A signal to whole sessions, where they still are."""
    for leader in leaders:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signum)
