"""Trainings whose ranks are forks of a process that has imported everything."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from support import ROOT
from support.environment import rank_variables, reserved_port, without_launcher
from support.forker import fork

HANG = 180  # seconds after which a process that should have ended is called hung


class Training:
    """`launch/train.py` on some ranks.

    Args:
        arguments: Of the command.
        ranks: How many.
        log: File that gets what all of them print.
        first: Called in each process before it starts; to be pickled.
    """

    def __init__(
        self, arguments: Sequence[str], ranks: int, log: Path, first: Callable[[], object] = int
    ) -> None:
        self.log = log
        # Through `cat`: a rank that may write no more files can still print.
        self._cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log.open("wb"))
        pipe, argv = self._cat.stdin, [str(ROOT / "launch" / "train.py"), *arguments]
        environment = without_launcher() | {"OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        self._port = contextlib.ExitStack()
        port = self._port.enter_context(reserved_port())
        forks = [
            fork(argv, environment | rank_variables(rank, ranks, port), stdout=pipe, stderr=pipe,
                 first=first)
            for rank in range(ranks)
        ]  # fmt: skip
        pipe.close()
        self._forks = {each.pid: each for each in forks}
        self.pids = list(self._forks)
        self.codes: dict[int, int] = {}  # exit code by process, negative for a signal

    def running(self) -> bool:
        """Whether any process is left."""
        codes = {pid: each.exitcode for pid, each in self._forks.items()}
        self.codes = {pid: code for pid, code in codes.items() if code is not None}
        return len(self.codes) < len(self.pids)

    def until(self, happens: Callable[[], bool], step: float = 0.001) -> bool:
        """Waits for something; tells whether it came before all processes ended."""
        deadline = time.monotonic() + HANG
        while not happens():
            if not self.running():
                return False
            if time.monotonic() > deadline:
                return False
            time.sleep(step)
        return True

    def send(self, signum: int, pid: int) -> None:
        """A signal to one process, if it is there."""
        if pid not in self.codes:
            os.kill(pid, signum)

    def end(self) -> list[int]:
        """Waits for all; their exit codes. What does not end is killed and counts as -9."""
        self.until(lambda: not self.running(), 0.005)
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, signal.SIGKILL)
                self._forks[pid].join()
                self.codes[pid] = -signal.SIGKILL
        self._cat.wait()
        self._port.close()
        return [self.codes[pid] for pid in self.pids]

    def said(self) -> str:
        """What was printed so far."""
        return self.log.read_text(errors="replace")
