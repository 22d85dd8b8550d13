"""One picture at a time, made in a thread of its own and told of step by step."""

import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from imagen_scale.errors import ImagenScaleError, UsageError, of_system, option, spelled
from imagen_scale.files.pictures import to_uint8
from imagen_scale.runs.checkpoint_average import kept_steps
from imagen_scale.runs.folders import samples_dir
from imagen_scale.sampling.folder import SampleFolder
from imagen_scale.sampling.option_facts import facts_of
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.residents import Residents
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.sheet import CHECKPOINT, plan_sheet, title
from imagen_scale.sampling.sheet_drawing import Source, draw, write
from imagen_scale.sampling.stage import Listener
from imagen_scale.sampling.stages import Remembered, TrainedStages
from imagen_scale.ui.sheet_values import asked

PATIENCE_S = 0.2  # after so long without news, one that was asked to stop says that it heard


class Request(NamedTuple):
    """What the page asks for."""

    prompt: str
    options: dict[str, Any]  # of `SamplingOptions`; None where a field was emptied
    runtime: Any  # a `RuntimeName`
    varied: dict[str, str] | None = None  # of a sheet: the values of an option as they are written


class Step(NamedTuple):
    """A stage went one step further."""

    unet: int
    done: int
    steps: int
    image: Any  # (H, W, 3) uint8: the clean picture that is expected there


class Drawn(NamedTuple):
    """Of a sheet so many pictures are done."""

    done: int
    pictures: int


class Said(NamedTuple):
    """What was chosen, and why."""

    sentence: str


class Made(NamedTuple):
    """The picture is finished and lies on disk."""

    path: Path


class Stopping(NamedTuple):
    """It was asked to end, and the step that is being computed takes its time."""


class Stopped(NamedTuple):
    """It was ended between two steps; nothing was written."""


class Failed(NamedTuple):
    """It cannot be made."""

    message: str


Event = Step | Drawn | Said | Made | Stopping | Stopped | Failed


class _StopError(Exception):
    """Leaves the sampler between two steps."""


class _Worker:
    """One thread for as long as the page is there.

    What torch.compile records for a card belongs to the thread that recorded it: a thread for each
    picture would record for each.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None

    def start(self, job: Callable[[], None]) -> threading.Event:
        """Does a job that raises nothing; what it gives is set when that is done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        done = threading.Event()
        self._jobs.put((job, done))
        return done

    def _work(self) -> None:
        while True:
            job, done = self._jobs.get()
            try:
                job()
            finally:
                done.set()


class Generator:
    """Makes the pictures of one run, never two at once.

    Args:
        run: The run's folder.
        unet_limit: Use only the first so many U-Nets.
        allow_unfinished: Accept stages whose training has not ended.
    """

    def __init__(
        self, run: Path, *, unet_limit: int | None = None, allow_unfinished: bool = False
    ) -> None:
        self.run, self.unet_limit, self.allow_unfinished = run, unet_limit, allow_unfinished
        self._is_free, self._worker = threading.Lock(), _Worker()
        self._residents: Residents | None = None
        self._remembered: Remembered = {}

    @property
    def is_busy(self) -> bool:
        """Whether a picture is being made."""
        return self._is_free.locked()

    def generate(self, request: Request, stop: threading.Event) -> Iterator[Event]:
        """Makes one picture.

        Args:
            request: Which one.
            stop: Set from outside to end it after the step that is being computed.

        Returns:
            What happens, ending with `Made`, `Stopped` or `Failed`. Of steps that have gathered
            while nobody asked, only the newest of a stage is told.
        """
        if not self._is_free.acquire(blocking=False):
            yield Failed("another picture is being made; wait for it, or stop it.")
            return
        told: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        done = self._worker.start(lambda: self._work(request, stop, told))
        try:
            yield from _newest(told, stop)
        finally:  # also when the page is closed in the middle of it
            stop.set()
            done.wait()
            self._is_free.release()

    def _work(
        self, request: Request, stop: threading.Event, told: "queue.SimpleQueue[Event | None]"
    ) -> None:
        try:
            make = self._make if request.varied is None else self._make_sheet
            told.put(Made(make(request, stop, told)))
        except _StopError:
            told.put(Stopped())
        except ImagenScaleError as error:
            told.put(Failed(with_labels(error.marked)))
        except OSError as error:
            told.put(Failed(of_system(error)))
        except Exception as error:  # a fault of ours: the page goes on, the terminal says where
            traceback.print_exc()
            told.put(Failed(f"{type(error).__name__}: {error}. The terminal says where."))
        finally:
            told.put(None)

    def _make(
        self, request: Request, stop: threading.Event, told: "queue.SimpleQueue[Event | None]"
    ) -> Path:
        options = checked(request)
        cascade = TrainedStages.load(
            self.run,
            runtime=RuntimeOptions.make(runtime=request.runtime),
            unet_limit=self.unet_limit,
            allow_unfinished=self.allow_unfinished,
            say=lambda sentence: told.put(Said(with_labels(sentence))),
        )
        # What one picture loaded, the next one finds.
        if self._residents is None:
            self._residents = Residents(cascade.device)
        cascade.residents = self._residents
        cascade.remembered = self._remembered

        def hear(unet: int, done: int, steps: int, x_0: Any) -> None:
            if stop.is_set():
                raise _StopError
            told.put(Step(unet, done, steps, to_uint8(x_0)[0]))

        pictures = cascade.stream([request.prompt], options, Listener(on_estimate=hear))
        folder = SampleFolder(samples_dir(self.run), cascade, options)
        if stop.is_set():
            raise _StopError
        (path,) = [folder.write(picture) for picture in pictures]
        return path

    def _make_sheet(
        self, request: Request, stop: threading.Event, told: "queue.SimpleQueue[Event | None]"
    ) -> Path:
        options = checked(request)
        same = {name: getattr(options, name) for name in options.model_fields_set}
        lists = {name: list(one) if isinstance(one, tuple) else one for name, one in same.items()}
        values, given = asked(
            request.varied or {}, lists | {"runtime": request.runtime},
            partial(kept_steps, self.run),
        )  # fmt: skip
        plan = plan_sheet([request.prompt], given)

        def hear(done: int, pictures: int) -> None:
            if stop.is_set():
                raise _StopError
            told.put(Drawn(done, pictures))

        if self._residents is not None:  # the sheet holds its own
            self._residents.make_room()
        pictures, facts = draw(
            plan, Source(self.run, self.unet_limit, self.allow_unfinished),
            say=lambda sentence: told.put(Said(with_labels(sentence))), progress=hear,
        )  # fmt: skip
        if stop.is_set():
            raise _StopError
        return write(plan, pictures, facts, self.run, title=title(plan, values))


def checked(request: Request) -> SamplingOptions:
    """The options of a request, after what only a page can get wrong.

    Raises:
        UsageError: Naming the field.
    """
    seed = request.options.get("seed")
    if seed is None or seed < 0:
        raise UsageError(
            f"{option('seed')}: a whole number from 0 on is needed; same seed, same picture."
        )
    for name, value in request.options.items():
        may_be_none = name in DEFAULTS and DEFAULTS[name] is None
        if isinstance(value, list | tuple) and None in value and not may_be_none:
            raise UsageError(f"{option(name)}: a number is needed for every stage.")
    given = {name: value for name, value in request.options.items() if value is not None}
    return SamplingOptions.make(**given)


def with_labels(message: str) -> str:
    """A message of the library with its options as the page labels them."""
    return spelled(message, lambda name: LABELS.get(name, name))


DEFAULTS = {facts.name: facts.default for facts in facts_of(SamplingOptions)}
LABELS = {
    facts.name: facts.label.lower()
    for facts in [*facts_of(SamplingOptions), *facts_of(RuntimeOptions), CHECKPOINT]
}


def _newest(told: "queue.SimpleQueue[Event | None]", stop: threading.Event) -> Iterator[Event]:
    """What is told, without the steps that a later one of their stage has overtaken."""
    waiting: list[Event | None] = []
    is_stopping = False
    while True:
        while not waiting:
            try:
                waiting.append(told.get(timeout=PATIENCE_S))
            except queue.Empty:
                if stop.is_set() and not is_stopping:
                    is_stopping = True
                    yield Stopping()
        while not told.empty():
            waiting.append(told.get())
        event = waiting.pop(0)
        if event is None:
            return
        if not (isinstance(event, Step) and any(_is_step_of(event.unet, one) for one in waiting)):
            yield event


def _is_step_of(unet: int, event: Event | None) -> bool:
    return isinstance(event, Step) and event.unet == unet
