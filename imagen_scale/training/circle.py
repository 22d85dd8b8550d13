"""The ranks of a training as each other sees them: beats in the store that they have in common."""

import hashlib
import os
import platform
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from imagen_scale.training.beats import BEAT_S, PRESENT, Beat, Seen, pid_namespace, started
from imagen_scale.training.ranks import rank, world_size

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

# Silence is counted in looks, each as long as the pause before it was meant to be: while the whole
# machine stands still nobody is silent, and on a busy one all take longer.
LOOK_S = BEAT_S / 10  # the pause of a rank that leaves
DEAF_S = 10.0  # one that has not beaten for so long cannot hear either


class Circle:
    """Publishes this rank's beat about every second and reads the others', in a thread.

    Args:
        store: Kept by rank 0.
        own: This rank's beat now.
        has_spoken: Asked once this rank leaves, until it says yes: nothing is left to be said.

    Attributes:
        seen: The others, by rank.
        answered: When the store last did, by this process's clock.
        is_store_lost: Whether rank 0 has closed the connection.
    """

    def __init__(
        self, store: "Store", own: Callable[[], Beat], has_spoken: Callable[[], bool]
    ) -> None:
        # A connection of its own: the group's is held by whoever waits in it.
        self._store = cast(Any, store).clone()
        self._own, self._has_spoken = own, has_spoken
        self.answered = now = time.monotonic()
        others = [number for number in range(world_size()) if number != rank()]
        self.seen = {number: Seen(Beat(number), now, now) for number in others}
        self._silent = dict.fromkeys(others, 0.0)  # seconds of looks since the last beat
        self.is_store_lost = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._exchange, name="beats", daemon=True)

    def start(self) -> None:
        """Begins to tell and to listen."""
        self._machine = pid_namespace()
        self._thread.start()

    def leave(self, patience: float, limit: float) -> None:
        """Tells the others at once how this rank leaves, as its beat now says.

        Args:
            patience: Seconds of looks in which the store may be silent: a rank that gave up on one
                that answers would say what another one says too.
            limit: Seconds of looks in all. Rank 0 keeps the store until the others have left.
        """
        self._wake.set()
        looks, silent, answered = 0, 0, self.answered
        while self._thread.is_alive() and looks * LOOK_S < limit and silent * LOOK_S < patience:
            self._thread.join(LOOK_S)
            looks += 1
            silent = silent + 1 if self.answered == answered else 0
            answered = self.answered

    def is_gone(self, beat: Beat) -> bool:
        """Whether its process is one of this machine's and has ended."""
        return beat.machine == self._machine and started(beat.pid) != beat.started

    def is_first_to_say(self, reason: str) -> bool:
        """Whether no other rank has asked this about the same."""
        # It may name a file, whose name Linux allows to be any bytes.
        digest = hashlib.sha256(reason.encode("utf-8", "surrogatepass")).hexdigest()
        return bool(self._store.add(f"imagen-scale said {digest}", 1) == 1)

    def has_said(self, reason: str) -> bool:
        """Whether rank 0, which answers no more, has left for this, and so has seen to its word."""
        keeper = self.seen.get(0)
        return keeper is not None and (keeper.beat.state, keeper.beat.reason) == ("failed", reason)

    def _exchange(self) -> None:
        number = 0
        while True:
            # Known without asking, which would make torch print a trace of its own.
            if rank() != 0 and self.is_gone(self.seen[0].beat):
                self.is_store_lost = True
                return
            number += 1
            beat = self._own()._replace(number=number)
            is_leaving = beat.state not in PRESENT
            try:
                self._store.set(_key(rank()), beat.to_json())
                self._read()
                if is_leaving and self._has_spoken():
                    if rank() != 0:
                        self._store.set(_key(rank()), beat._replace(has_left=True).to_json())
                        return
                    if self._is_last():
                        return
            except RuntimeError:  # all of torch's errors are
                self.is_store_lost = True
                return
            pause = LOOK_S if is_leaving else BEAT_S
            (time.sleep if self._wake.is_set() else self._wake.wait)(pause)
            for other in self.seen:
                self._silent[other] += pause

    def _read(self) -> None:
        present = [
            number
            for number, seen in self.seen.items()
            if seen.beat.number or self._store.check([_key(number)])
        ]
        beats = self._store.multi_get([_key(number) for number in present]) if present else []
        now = self.answered = time.monotonic()
        for number, text in zip(present, beats, strict=True):
            before, beat = self.seen[number], Beat.from_json(text)
            if beat.number != before.beat.number:
                self._silent[number] = 0.0
            self.seen[number] = before.renewed(beat, now)

    def _is_last(self) -> bool:
        """Whether every other rank has left, or cannot hear why this one leaves."""
        return all(
            seen.beat.has_left  # one that failed may not know yet that its word was said
            or self.is_gone(seen.beat)
            or self._silent[number] > DEAF_S
            for number, seen in self.seen.items()
        )


def this_process() -> Beat:
    """The beat of a process that has just begun."""
    pid = os.getpid()
    return Beat(rank(), platform.node(), pid_namespace(), pid, started(pid))


def _key(number: int) -> str:
    return f"imagen-scale beat of rank {number}"
