"""Measurements in processes with time limits: whatever one of them does, the others are taken."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from support import ROOT
from support.environment import without_launcher

from card_parts.child import AGAIN
from card_parts.measurement import CRASHED, LEFT_OUT, SKIPPED, TIMED_OUT, Measurement, Row, row

LEAST_S = 5.0  # with less time than this nothing is begun
POLL_S = 0.05
TAIL = 300  # characters of a crashed process's last words


class Processes:
    """Takes measurements until the time is up.

    Args:
        folder: For what the processes print, `log/NAME.txt`.
        minutes: For all of it.
        on_card: Whether the processes may see a card.
    """

    def __init__(self, folder: Path, minutes: float, *, on_card: bool) -> None:
        self.folder, self.on_card = folder / "log", on_card
        self.folder.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + 60 * minutes
        self.cache = folder / "log" / "cache"

    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()

    def run(self, measurements: Iterable[Measurement]) -> Iterator[Row]:
        """Gives a row for each, as soon as it is known."""
        measurements = list(measurements)
        yield from (row(one, LEFT_OUT, why=one.reason) for one in measurements if one.reason)
        possible = (one for one in measurements if not one.reason)
        for group, members in groupby(possible, lambda one: one.group or one.name):
            remaining = list(members)
            while remaining:
                if self.left() < LEAST_S:
                    yield from (row(one, SKIPPED, why="the time was up") for one in remaining)
                    break
                yield from self._one_process(group, remaining)

    def _one_process(self, group: str, remaining: list[Measurement]) -> Iterator[Row]:
        """Takes off `remaining` what one process answers, and what it fails at."""
        name = "".join(c if c.isalnum() else "_" for c in group)[:60]
        questions, answers = self.folder / f"{name}.json", self.folder / f"{name}.jsonl"
        questions.write_text(json.dumps(remaining), encoding="utf-8")
        answers.write_text("", encoding="utf-8")
        log = self.folder / f"{name}.txt"
        command = [sys.executable, "-m", "card_parts.child", str(questions), str(answers)]
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=ROOT,
                env=self._environment(), start_new_session=True,
            )  # fmt: skip
        try:
            with answers.open(encoding="utf-8") as lines:
                yield from self._answers(process, lines, remaining, log)
        finally:
            _end(process)

    def _answers(
        self,
        process: "subprocess.Popen[bytes]",
        lines: Iterable[str],
        remaining: list[Measurement],
        log: Path,
    ) -> Iterator[Row]:
        start, begun = time.monotonic(), ""
        while remaining:
            has_ended = process.poll() is not None  # asked first: what it wrote is read below
            for part in lines:
                begun += part
                if begun.endswith("\n"):
                    yield json.loads(begun)
                    remaining.pop(0)
                    start, begun = time.monotonic(), ""
            if not remaining:
                break
            took, one = time.monotonic() - start, remaining[0]
            if has_ended:
                if process.returncode != AGAIN:
                    remaining.pop(0)
                    yield row(one, CRASHED, why=_last_words(process.returncode, log), seconds=took)
                return
            if took > one.limit_s or self.left() <= 0:
                _end(process)
                remaining.pop(0)
                if took > one.limit_s:
                    yield row(one, TIMED_OUT, why=f"after {took:.0f} s", seconds=took)
                else:
                    yield row(one, SKIPPED, why="the time was up while it ran", seconds=took)
                return
            time.sleep(POLL_S)

    def _environment(self) -> dict[str, str]:
        environment = without_launcher() | {
            # What the planner finds, and what a card was calibrated to, stays in the folder.
            "IMAGEN_SCALE_CACHE": str(self.cache),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        paths = [str(ROOT / name) for name in ("", "export", "tests", "benchmarks")]
        paths += filter(None, [environment.get("PYTHONPATH")])
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        if not self.on_card:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        return environment


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and all that it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that a driver holds goes later
            process.wait(30)


def _last_words(code: int, log: Path) -> str:
    reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{reason}: {said[-1][-TAIL:]}" if said else reason
