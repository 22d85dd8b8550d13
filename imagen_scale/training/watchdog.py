"""Ranks that watch each other: when one dies, hangs or fails, the others hear of it and stop.

They do so through a store that they have in common, because a collective names nobody: NCCL waits
for 30 minutes, gloo raises what looks like a fault of ours. One thread talks to the store and may
be stuck in it when rank 0 is stopped; the other judges by the clock. It ends with `os._exit`, since
nothing else ends a thread that waits in a collective.

Whatever ends the ranks is said once. A rank that fails knows it best and says it itself, unless all
fail of the same: then one of them does. Of one that is lost the first rank that is left speaks.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from imagen_scale.errors import ImagenScaleError, exit_code_of, of_system
from imagen_scale.training.beats import (
    BEAT_S,
    EARLY,
    GRACE_S,
    LEAVING_S,
    PRESENT,
    SAVING,
    STARTING,
    Beat,
    State,
    faults,
    io_bytes,
)
from imagen_scale.training.circle import Circle, this_process
from imagen_scale.training.preemption import Preempted
from imagen_scale.training.ranks import exchanges, rank

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

ASLEEP_S = 10.0  # between two looks: this process itself was stopped
ALIKE_S = 3.0  # ranks that fail of the same do so within; shorter than the grace of the others
LINGER_S = 15.0  # rank 0 keeps the beats, so it is the last to leave

ADVICE = "Run the same command again: it continues from the newest checkpoint."

T = TypeVar("T")


def _say_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


class Watchdog:
    """While it is entered, the other ranks know what this one does, and the reverse.

    A collective waits for a lost rank for ever, or for half an hour, and its error names nobody.
    So each rank tells the others its beat (`Circle`), and judges theirs in a thread that asks
    nobody. The end is `os._exit`: a thread that waits in a collective cannot be told anything.

    Args:
        timeout: Seconds that a rank may be silent or stand still; None for any. A process that
            is gone, and one that failed, are found in any case. May be changed.
        store: Which the ranks have in common; None for one rank.
        tell: Says to the user what ends this rank.
    """

    def __init__(
        self,
        timeout: float | None,
        store: "Store | None" = None,
        tell: Callable[[str], None] = _say_error,
    ) -> None:
        self.timeout, self.store, self.tell = timeout, store, tell
        self._phase, self._step, self._progress = STARTING, 0, 0
        self._state: State = "running"
        self._reason, self._exit_code, self._is_leaving = "", 1, False
        self._ended_at, self._has_spoken = 0.0, False
        self._is_over = threading.Event()

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
        if self.store is None:
            return self
        self._thread = threading.get_native_id()
        self._process = this_process()
        self._circle = Circle(self.store, self._beat, self._speak_if_needed)
        self._awake_since = time.monotonic()
        self._leaving_lock = threading.Lock()
        self._judging = threading.Thread(target=self._judge, name="watchdog", daemon=True)
        self._circle.start()
        self._judging.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.store is None:
            return
        if isinstance(error, Preempted) and rank() == 0:  # all are, after the same step
            self.tell(error.marked)
        if error is None or isinstance(error, Preempted):
            self._end("done")
            return
        if isinstance(error, Exception) and not isinstance(error, ImagenScaleError):
            self._wait_for_an_explanation()  # maybe it is of an exchange that a lost rank broke
        self._exit_code = exit_code_of(error)
        self._end("failed", _reason(error))
        # Rank 0 does not answer. Unless it failed of the same, nobody else can know.
        if not self._has_spoken and not self._circle.has_said(self._reason):
            self.tell(self._beat().failure)

    def _wait_for_an_explanation(self) -> None:
        """Ends this process if another rank turns out to be at fault."""
        since = time.monotonic()
        while time.monotonic() < since + self._patience():
            if self._faults():
                time.sleep(2 * BEAT_S)  # one that is gone may have said why: it is read first
                if found := self._faults():
                    self._leave(found)
            time.sleep(BEAT_S / 4)

    def _patience(self) -> float:
        """Seconds in which another rank may explain why this one failed."""
        # One behind this one failed first, waits itself, and then its beat takes a second.
        failed_first = any(
            seen.beat.state == "leaving" and seen.beat.progress < self._progress
            for seen in self._circle.seen.values()
        )
        return 3 * GRACE_S if failed_first else GRACE_S

    def _beat(self) -> Beat:
        is_ended_by_exception = self._is_leaving and self._state == "running"
        return self._process._replace(
            state="leaving" if is_ended_by_exception else self._state, phase=self._phase,
            step=self._step, progress=self._progress + exchanges(), reason=self._reason,
            activity=io_bytes(self._thread) if self._phase == SAVING else 0,
            exit_code=self._exit_code,
        )  # fmt: skip

    def _speak_if_needed(self) -> bool:
        """Says why this rank failed, if nobody else does; False as long as that is not known."""
        if self._state != "failed" or self._has_spoken:
            return True
        beats = [seen.beat for seen in self._circle.seen.values()]
        are_alike = all(b.state == "failed" and b.reason == self._reason for b in beats)
        are_settled = all(beat.state not in PRESENT or self._circle.is_gone(beat) for beat in beats)
        if not are_settled and time.monotonic() - self._ended_at < ALIKE_S:
            return False
        # Another one that fails of the same later is silent.
        is_first = self._circle.is_first_to_say(self._reason)
        self._has_spoken = True
        if is_first:
            beat = self._beat()
            advice = "" if are_alike or beat.phase in EARLY else f" {ADVICE}"
            self.tell(self._reason if are_alike else f"{beat.failure}{advice}")
        return True

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
            list(self._circle.seen.values()),
            now=time.monotonic(),
            awake_since=self._awake_since,
            answered=self._circle.answered,
            is_store_lost=self._circle.is_store_lost,
            timeout=self.timeout,
            is_gone=self._circle.is_gone,
        )

    def _leave(self, found: dict[int, str]) -> None:
        """Says who is at fault, lets the others know, and ends this process."""
        with self._leaving_lock:  # once
            beats = {number: seen.beat for number, seen in self._circle.seen.items()}
            lost = [n for n in sorted(found) if beats[n].state != "failed"]
            reason = " ".join(found[number] for number in lost or sorted(found))
            # The first rank that can. One that left before this one has said it.
            before = {n: beat.state for n, beat in beats.items() if n < rank()}
            if not any(s == "left" or (s in PRESENT and n not in found)
                       for n, s in before.items()):  # fmt: skip
                if lost:
                    self.tell(f"{reason} {ADVICE}")
                elif all(beats[n].host != self._process.host for n in found):
                    # They have said it themselves, where it may not be seen from here.
                    print(f"stopped: {reason.splitlines()[0]}", file=sys.stderr, flush=True)
            self._exit_code = max(beats[number].exit_code for number in found)
            self._end("left", reason)
            sys.stdout.flush()
            os._exit(self._exit_code)

    def _end(self, state: State, reason: str = "") -> None:
        """Tells the others how this rank leaves; the others need rank 0 until they have left."""
        self._is_over.set()
        self._ended_at, self._reason = time.monotonic(), reason
        self._state = state
        self._circle.leave(LINGER_S if rank() == 0 else GRACE_S, LINGER_S)


def _reason(error: BaseException) -> str:
    """What a user is told of an error."""
    if isinstance(error, ImagenScaleError):
        return error.marked
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: the same command continues from the newest checkpoint"
    if isinstance(error, OSError) and error.strerror:
        return of_system(error)
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
