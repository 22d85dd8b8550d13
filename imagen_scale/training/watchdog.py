"""Ranks that watch each other: when one dies or hangs, the others say which and stop.

They do so through the group's store, because a collective names nobody: NCCL waits for 30 minutes,
gloo raises what looks like a fault of ours. One thread talks to the store and may be stuck in it
when rank 0 is stopped; the other judges by the clock. It ends with `os._exit`, since nothing else
ends a thread that waits in a collective.
"""

import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch

from imagen_scale.errors import ImagenScaleError
from imagen_scale.training.beats import (
    LEAVING_S,
    PRESENT,
    Beat,
    Seen,
    State,
    faults,
    pid_namespace,
    started,
)
from imagen_scale.training.preemption import Preempted
from imagen_scale.training.ranks import rank, world_size

BEAT_S = 1.0
ASLEEP_S = 10.0  # between two looks: this process itself was stopped
# Ranks that fail together need no explanation: each gets this long to leave by itself, and one
# whose exchange a lost rank broke to find out who that was.
GRACE_S = 5.0
LINGER_S = 15.0  # rank 0 keeps the beats, so it is the last to leave,
DEAF_S = 3.0  # except those that have not beaten for so long

ADVICE = "Run the same command again: it continues from the newest checkpoint."

T = TypeVar("T")


class Watchdog:
    """While it is entered, the other ranks know what this one does, and the reverse.

    A collective waits for a lost rank for ever, or for half an hour, and its error names nobody.
    So each rank publishes a beat in the group's store, which rank 0 keeps, and reads the others'.
    Two threads: one talks to the store and may be stuck in it, the other judges by the clock. The
    end is `os._exit`: a thread that waits in a collective cannot be told anything.

    Args:
        timeout: Seconds that a rank may be silent or stand still; None for any. A process that
            is gone, and one that failed, are found in any case.
    """

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._phase, self._step, self._progress, self._number = "starting", 0, 0, 0
        self._state: State = "running"
        self._reason, self._is_leaving = "", False
        self._is_watching = world_size() > 1
        self._wake, self._is_over = threading.Event(), threading.Event()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names what this rank does inside; an exception leaves it at the phase it came from."""
        before, self._phase = self._phase, name
        self._is_leaving = False
        try:
            yield
        except BaseException:
            self._is_leaving = True
            raise
        self._phase = before

    def loading(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; waiting for each is a phase."""
        while True:
            with self.phase("loading data"):
                batch = next(batches, None)
            if batch is None:
                return
            self._progress += 1
            yield batch

    def stepped(self, step: int) -> None:
        """Notes that a step is done."""
        self._step = step
        self._progress += 1

    def __enter__(self) -> "Watchdog":
        if not self._is_watching:
            return self
        # A connection of its own: the group's is held by whoever waits in it.
        store: Any = torch.distributed.distributed_c10d._get_default_store()
        self._store = store.clone()
        self._process = Beat(
            rank(), platform.node(), pid_namespace(), os.getpid(), started(os.getpid())
        )
        now = time.monotonic()
        others = [number for number in range(world_size()) if number != rank()]
        self._seen = {number: Seen(Beat(number), now, now) for number in others}
        self._awake_since = self._answered = now
        self._is_store_lost = False
        self._leaving_lock = threading.Lock()
        self._exchanging = threading.Thread(target=self._exchange, name="beats", daemon=True)
        self._judging = threading.Thread(target=self._judge, name="watchdog", daemon=True)
        self._exchanging.start()
        self._judging.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._is_watching:
            return
        if error is None or isinstance(error, Preempted):
            self._end("done")
            return
        own = isinstance(error, ImagenScaleError)
        if isinstance(error, Exception) and not own:  # maybe of an exchange that a lost rank broke
            since = time.monotonic()
            while time.monotonic() < since + self._patience():
                if self._faults():
                    time.sleep(2 * BEAT_S)  # one that is gone may have said why: it is read first
                    if found := self._faults():
                        self._leave(found)
                time.sleep(BEAT_S / 4)
        lines = str(error).splitlines() or [""]
        self._end("failed", lines[0] if own else f"{type(error).__name__}: {lines[0]}")

    def _patience(self) -> float:
        """Seconds in which another rank may explain why this one failed."""
        # One behind this one failed first, waits itself, and then its beat takes a second.
        failed_first = any(
            seen.beat.state == "leaving" and seen.beat.progress < self._progress
            for seen in self._seen.values()
        )
        return 3 * GRACE_S if failed_first else GRACE_S

    def _beat(self) -> Beat:
        is_ended_by_exception = self._is_leaving and self._state == "running"
        return self._process._replace(
            state="leaving" if is_ended_by_exception else self._state, phase=self._phase,
            step=self._step, progress=self._progress, reason=self._reason, number=self._number,
        )  # fmt: skip

    def _exchange(self) -> None:
        """Publishes this rank's beat and reads the others', until this rank leaves."""
        while True:
            # Known without asking, which would make torch print a trace of its own.
            if rank() != 0 and self._is_gone(self._seen[0].beat):
                self._is_store_lost = True
                return
            is_leaving = self._state != "running"
            self._number += 1
            try:
                self._store.set(_key(rank()), self._beat().to_json())
                present = [n for n in self._seen if self._seen[n].beat.number
                           or self._store.check([_key(n)])]  # fmt: skip
                beats = self._store.multi_get([_key(n) for n in present]) if present else []
            except RuntimeError:  # all of torch's errors are
                self._is_store_lost = True
                return
            now = self._answered = time.monotonic()
            for number, beat in zip(present, beats, strict=True):
                self._seen[number] = self._seen[number].renewed(Beat.from_json(beat), now)
            if is_leaving and (rank() != 0 or self._is_last()):
                return
            self._wake.wait(BEAT_S)
            if is_leaving:
                time.sleep(BEAT_S / 10)

    def _is_last(self) -> bool:
        """Whether every other rank has left, or cannot hear why this one leaves."""
        return all(
            seen.beat.state not in PRESENT
            or self._is_gone(seen.beat)
            or time.monotonic() - seen.beaten > DEAF_S
            for seen in self._seen.values()
        )

    def _is_gone(self, beat: Beat) -> bool:
        """Whether its process is one of this machine's and has ended."""
        return beat.machine == self._process.machine and started(beat.pid) != beat.started

    def _judge(self) -> None:
        """Looks for ranks at fault, and stops this one if there are any."""
        last, since = time.monotonic(), None
        while not self._is_over.wait(BEAT_S):
            now = time.monotonic()
            if now - last > ASLEEP_S:
                self._awake_since = now
            last = now
            found = self._faults()
            since = (since or now) if found else None
            grace = LEAVING_S if self._is_leaving else GRACE_S
            if since is not None and now - since >= grace:
                self._leave(found)

    def _faults(self) -> dict[int, str]:
        return faults(
            self._beat(),
            list(self._seen.values()),
            now=time.monotonic(),
            awake_since=self._awake_since,
            answered=self._answered,
            is_store_lost=self._is_store_lost,
            timeout=self.timeout,
            is_gone=self._is_gone,
        )

    def _leave(self, found: dict[int, str]) -> None:
        """Says who is at fault, lets the others know, and ends this process."""
        with self._leaving_lock:  # once
            reason = " ".join(found[number] for number in sorted(found))
            # The first rank that can. One that left before this one has said it.
            before = {n: seen.beat.state for n, seen in self._seen.items() if n < rank()}
            if not any(s == "left" or (s in PRESENT and n not in found)
                       for n, s in before.items()):  # fmt: skip
                print(f"error: {reason} {ADVICE}", file=sys.stderr, flush=True)
            self._end("left", reason)
            sys.stdout.flush()
            os._exit(1)

    def _end(self, state: State, reason: str = "") -> None:
        """Tells the others how this rank leaves; the others need rank 0 until they have left."""
        self._is_over.set()
        self._state, self._reason = state, reason
        self._wake.set()
        self._exchanging.join(LINGER_S if rank() == 0 else GRACE_S)


def _key(number: int) -> str:
    return f"imagen-scale beat of rank {number}"
