"""Pictures that wait to be computed: bounded, first come first served, equal ones together."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from imagen_scale.diffusion.guidance import Branch, branches
from imagen_scale.sampling.options import StageSettings
from imagen_scale.sampling.wanted import Wanted
from imagen_scale.serving.contract import Drawn


class Step(NamedTuple):
    """A stage went one step further, for all that are computed together."""

    unet: int  # from 1
    step: int  # done
    steps: int  # in all


class Made(NamedTuple):
    """The picture is finished."""

    picture: Drawn


class Failed(NamedTuple):
    """It cannot be made."""

    error: BaseException


Event = Step | Made | Failed


class Kind(NamedTuple):
    """What pictures must share to be computed together; seed, prompt and guidance may differ."""

    settings: tuple[StageSettings, ...]  # of each stage that is sampled, without their guidance
    branches: tuple[frozenset[Branch], ...]  # of each: what is not guided stays half the work
    negative_prompt: str | None

    @classmethod
    def of(cls, settings: Sequence[StageSettings], negative_prompt: str | None) -> "Kind":
        """Of resolved settings."""
        alike = tuple(one.model_copy(update={"cond_scale": 1.0}) for one in settings)
        needed = tuple(branches(one.cond_scale) for one in settings)
        return cls(alike, needed, negative_prompt)


@dataclass(eq=False)
class Job:
    """One picture that somebody waits for."""

    wanted: Wanted
    kind: Kind
    tell: Callable[[Event], None]  # from the worker's thread
    wants_steps: bool = True  # to be told of each
    arrived: float = field(default_factory=time.monotonic)
    is_gone: bool = False  # nobody waits any more
    is_finished: bool = False
    _last: tuple[int, int] = (0, 0)

    def hear(self, told: Step) -> None:
        """Tells of a step where that is wanted, unless it was told of a later one.

        Where a batch is computed in parts, each part begins at the first step again.
        """
        is_news = (told.unet, told.step) > self._last
        if self.wants_steps and is_news and not self.is_finished:
            self._last = told.unet, told.step
            self.tell(told)

    def finish(self, told: Made | Failed) -> None:
        """Tells how it ended, once."""
        if not self.is_finished:
            self.is_finished = True
            self.tell(told)


class FullError(Exception):
    """There is no room for so many more."""


class ClosedError(Exception):
    """Nothing is taken any more."""


class Waiting:
    """Jobs of many threads for one that takes them.

    Args:
        limit: Pictures that may wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._jobs: deque[Job] = deque()
        self._is_closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, jobs: Sequence[Job]) -> None:
        """Adds all of them, or none.

        Raises:
            FullError: If they are more than there is room for.
            ClosedError: After `close`.
        """
        with self._changed:
            if self._is_closed:
                raise ClosedError
            if len(self._jobs) + len(jobs) > self.limit:
                raise FullError
            self._jobs.extend(jobs)
            self._changed.notify()

    def drop(self, jobs: Iterable[Job]) -> int:
        """Nobody waits for these; gives how many were not begun."""
        gone = set(jobs)
        with self._changed:
            for job in gone:
                job.is_gone = True
            before = len(self._jobs)
            self._jobs = deque(job for job in self._jobs if job not in gone)
            return before - len(self._jobs)

    def take(self, most: int, patience_s: float) -> list[Job]:
        """The oldest, and others of its kind; nothing once it is closed and empty.

        Args:
            most: Together.
            patience_s: How long the oldest waits for company at most, from its arrival.
        """
        with self._changed:
            while True:
                if not self._jobs:
                    if self._is_closed:
                        return []
                    self._changed.wait()
                    continue
                oldest = self._jobs[0]
                alike = [job for job in self._jobs if job.kind == oldest.kind][:most]
                left = oldest.arrived + patience_s - time.monotonic()
                if len(alike) == most or left <= 0 or self._is_closed:
                    taken = set(alike)
                    self._jobs = deque(job for job in self._jobs if job not in taken)
                    return alike
                self._changed.wait(left)

    def close(self) -> None:
        """Takes no more; what waits may still be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def end(self) -> list[Job]:
        """Closes, and gives back what waits."""
        self.close()
        with self._changed:
            left, self._jobs = list(self._jobs), deque()
            return left
