"""The one thread that has the cascade: takes what waits, computes it, tells whoever waits."""

import math
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Literal

from imagen_scale.errors import CardProblem, EnvironmentProblem, ImagenScaleError, UsageError
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.wanted import Wanted
from imagen_scale.serving.contract import ServedCascade
from imagen_scale.serving.metrics import Metrics
from imagen_scale.serving.refusal import Refusal
from imagen_scale.serving.waiting import ClosedError, Failed, FullError, Job, Made, Step, Waiting

State = Literal["loading", "ready", "draining", "ended"]
LONGEST_RETRY_S = 120


class _NobodyWaitsError(Exception):
    """Leaves the sampler between two steps."""


class Engine:
    """Makes the pictures of one cascade for many callers.

    Args:
        cascade: Draws them.
        max_batch: Pictures computed together at most.
        patience_s: How long a picture waits for company at most.
        queue: Pictures that may wait.
    """

    def __init__(
        self, cascade: ServedCascade, *, max_batch: int, patience_s: float, queue: int
    ) -> None:
        self.cascade, self.max_batch, self.patience_s = cascade, max_batch, patience_s
        self.waiting = Waiting(queue)
        self.metrics = Metrics(lambda: len(self.waiting))
        self.failure: BaseException | None = None  # what ended the thread
        self.loaded = threading.Event()  # set when the stages are, or cannot be
        self._is_draining = self._is_stopped = False
        self._current: list[Job] = []
        self._picture_s = 0.0  # of the last batch, a picture
        self._thread = threading.Thread(target=self._work, name="cascade", daemon=True)

    @property
    def state(self) -> State:
        """Whether it can be asked for pictures."""
        if self.failure is not None:
            return "ended"
        if self._is_draining:
            return "draining"
        return "ready" if self.loaded.is_set() else "loading"

    @property
    def is_started(self) -> bool:
        """Whether its thread was begun."""
        return self._thread.ident is not None

    def start(self) -> None:
        """Begins to load the stages, and then to work."""
        self._thread.start()

    def drain(self) -> None:
        """Accepts no more, finishes what it has and waits until that is done."""
        self._is_draining = True
        self.waiting.close()
        self.join()

    def join(self) -> None:
        """Waits until its thread has ended, drained or by a failure."""
        self._thread.join()

    def stop(self) -> None:
        """Gives up what waits, and what is computed after the step that it is at."""
        self._is_draining = self._is_stopped = True
        self._give_up(self.waiting.end())

    def submit(self, jobs: Sequence[Job]) -> None:
        """Accepts pictures, all or none.

        Raises:
            Refusal: If there is no room, or no work is done any more.
        """
        try:
            self.waiting.put(jobs)
        except FullError:
            seconds = math.ceil(len(self.waiting) * self._picture_s)
            raise Refusal(
                429,
                f"{len(self.waiting)} pictures are waiting, and {self.waiting.limit} may; try "
                f"again later.",
                code="rate_limit_exceeded",
                retry_s=min(max(seconds, 1), LONGEST_RETRY_S),
            ) from None
        except ClosedError:
            raise _ended(self.failure) from None

    def drop(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: what was not begun never is."""
        self.metrics.pictures.labels("dropped").inc(self.waiting.drop(jobs))

    def _work(self) -> None:
        try:
            self._warm_up()
            self.loaded.set()
            while taken := self.waiting.take(self.max_batch, self.patience_s):
                self._current = taken
                self._compute(taken)
                self._current = []
        except BaseException as error:
            self.failure = error
            if not isinstance(error, ImagenScaleError):
                traceback.print_exc()
        finally:
            self.loaded.set()
            left = [job for job in self._current if not job.is_finished] + self.waiting.end()
            self.metrics.pictures.labels("failed").inc(len(left))
            self._give_up(left)  # nobody waits for a dead thread

    def _warm_up(self) -> None:
        """One step of every stage, so that the first caller waits for nothing but pictures."""
        usual = self.cascade.settings(SamplingOptions(), len(self.cascade.sizes))
        settings = [of_stage.model_copy(update={"steps": 1}) for of_stage in usual]
        list(self.cascade.draw([Wanted("warm", 0)], settings, None, lambda *step: None))

    def _compute(self, jobs: Sequence[Job]) -> None:
        begun = time.monotonic()
        for job in jobs:
            self.metrics.waited.observe(begun - job.arrived)
        self.metrics.batch.observe(len(jobs))
        self._make(jobs)
        seconds = time.monotonic() - begun
        self.metrics.computed.observe(seconds)
        self._picture_s = seconds / len(jobs)

    def _make(self, jobs: Sequence[Job]) -> None:
        """Makes pictures of one kind; if that fails, in halves, until the one is found that does.

        A picture that cannot be computed, as with an absurd guidance, does not take others along,
        and a batch that memory does not hold is none.
        """
        begun, jobs = len(jobs), [job for job in jobs if not job.is_gone]
        self.metrics.pictures.labels("dropped").inc(begun - len(jobs))
        if not jobs:
            return
        kind, done = jobs[0].kind, 0

        def hear(unet: int, step: int, steps: int) -> None:
            if self._is_stopped or all(job.is_gone for job in jobs[done:]):
                raise _NobodyWaitsError
            for job in jobs:
                job.hear(Step(unet, step, steps))

        try:
            for picture in self.cascade.draw(
                [job.wanted for job in jobs], kind.settings, kind.negative_prompt, hear
            ):
                self.metrics.pictures.labels("made").inc()  # counted before anybody hears of it
                jobs[done].finish(Made(picture))
                done += 1
        except _NobodyWaitsError:
            self.metrics.pictures.labels("dropped").inc(len(jobs) - done)
            self._give_up(jobs[done:])
        except CardProblem:
            raise
        except Exception as error:
            left = jobs[done:]
            if len(left) == 1 or isinstance(error, UsageError):
                self._fail(left, error)
            else:
                self._make(left[: len(left) // 2])
                self._make(left[len(left) // 2 :])

    def _give_up(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.finish(Failed(_ended(self.failure)))

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        if not isinstance(error, ImagenScaleError):  # a fault of ours: the log says where
            traceback.print_exception(error)
        elif not isinstance(error, UsageError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        self.metrics.pictures.labels("failed").inc(len(jobs))
        for job in jobs:
            job.finish(Failed(error))


def _ended(failure: BaseException | None) -> Refusal:
    if failure is None:
        return Refusal(503, "the server is about to end and takes no more work.", retry_s=1)
    return Refusal(503, "the server can make no more pictures; its log says why.")


def ended_by(failure: BaseException) -> ImagenScaleError:
    """What ended the thread, for whoever started it."""
    if isinstance(failure, ImagenScaleError):
        return failure
    return EnvironmentProblem(
        f"the thread that makes pictures ended: {type(failure).__name__}: {failure}; start again."
    )
