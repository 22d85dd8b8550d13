"""The page: form, stages, status and history, and what happens at each click."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from imagen_scale.config import load_config
from imagen_scale.runs.folders import config_path, samples_dir
from imagen_scale.runs.inference import learned_stages
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.options import RuntimeName
from imagen_scale.ui import views
from imagen_scale.ui.form import Form
from imagen_scale.ui.generation import Failed, Generator, Made, Said, Step, Stopped, Stopping
from imagen_scale.ui.history import Entry, read_history
from imagen_scale.ui.sheet_form import SheetForm
from imagen_scale.ui.shell_line import sample_command


class Opened(NamedTuple):
    """The run that the page is about."""

    folder: Path
    runtime: RuntimeName = "auto"  # chosen at first
    unet_limit: int | None = None
    allow_unfinished: bool = False


class Page:
    """What happens at each click; `build` lays it out.

    Args:
        run: What is sampled.
    """

    def __init__(self, run: Opened) -> None:
        config = load_config(config_path(run.folder))
        self.run = run
        self.num_unets = len(config.unets)
        stages = config.stages()[: run.unet_limit]
        self.sizes = [stage.size for stage in stages]
        self.few = learned_stages(run.folder, len(self.sizes))
        self.own = SamplingOptions().for_stages(stages)
        self.samples = samples_dir(run.folder)
        self.generator = Generator(
            run.folder, unet_limit=run.unet_limit, allow_unfinished=run.allow_unfinished
        )
        self.stops: dict[str, threading.Event] = {}  # of the pages that make a picture

    def build(self) -> Any:
        """The page, as gradio's `Blocks`."""
        name = self.run.folder.resolve().name
        with gr.Blocks(
            title=f"{name} - imagen-scale", analytics_enabled=False, fill_width=True
        ) as page:
            gr.HTML(views.header(name, self.sizes))
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self.form = Form(self.sizes, self.run.runtime, self.own, self.few)
                    with gr.Row(elem_classes="is-buttons"):
                        self.start = gr.Button(
                            "Make picture", variant="primary", scale=2, min_width=120,
                            elem_id="start",
                        )  # fmt: skip
                        self.stop = gr.Button(
                            "Stop", interactive=False, min_width=70, elem_id="stop"
                        )
                        self.dice = gr.Button("New seed", min_width=90, elem_id="dice")
                    self.sheet_form = SheetForm()
                with gr.Column(scale=3, min_width=320):
                    with gr.Row(elem_classes="is-stages"):
                        self.stages = [
                            gr.HTML(views.stage(unet, size), min_width=150)
                            for unet, size in enumerate(self.sizes, start=1)
                        ]
                    self.status = gr.HTML(elem_id="status")
                    self.sheet = gr.HTML(elem_id="drawn-sheet")
            gr.HTML('<h2 class="is-title">History</h2>')
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    self.line = gr.HTML()
                    self.gallery = gr.Gallery(
                        show_label=False, columns=5, height="auto", object_fit="contain",
                        fit_columns=False, allow_preview=False, interactive=False, buttons=[],
                        elem_id="history", elem_classes="is-history",
                    )  # fmt: skip
                with gr.Column(scale=2, min_width=320):
                    self.details = gr.HTML(views.details(None), elem_id="details")
                    self.command = gr.Code(
                        label="The same on the command line", language="shell", lines=2,
                        wrap_lines=True, interactive=False, show_line_numbers=False,
                        buttons=["copy"], visible=False, elem_id="command",
                    )  # fmt: skip
                    self.reuse = gr.Button("Take these settings", visible=False, elem_id="reuse")
            # What the gallery shows and which of it is selected: the folder may change meanwhile.
            self.shown, self.selected = gr.State([]), gr.State(None)
            self._connect(page)
        return page

    def _connect(self, page: Any) -> None:
        at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        history = [self.line, self.gallery, self.shown]
        selection = [self.selected, self.details, self.command, self.reuse]
        buttons = [self.start, self.stop]
        gr.on([self.start.click, self.form.prompt.submit, self.form.negative.submit],
              self.begin, None, [*buttons, self.status, *self.stages], **at_once,
        ).success(
            self.generate, self.form.fields, [self.status, *self.stages, *history, *selection],
            concurrency_limit=1, concurrency_id="made", show_progress="hidden",
            api_name="generate",
        ).then(self.end, None, buttons, **at_once)  # fmt: skip
        self.sheet_form.connect(self, [*buttons, self.status, *self.stages], history, at_once)
        self.stop.click(self.halt, None, None, queue=False,
                        show_progress="hidden", api_name="stop")  # fmt: skip
        self.dice.click(lambda: random.randrange(2**31), None, self.form.seed, **at_once)
        self.gallery.select(self.select, self.shown, selection, **at_once)
        self.reuse.click(self.take, self.selected, self.form.fields, **at_once)
        page.load(self.history, None, history, **at_once)

    # What happens ------------------------------------------------------------------------------

    def begin(self, request: gr.Request) -> dict[Any, Any]:
        """Before a picture: one at a time from each page."""
        if request.session_hash in self.stops:
            raise gr.Error("A picture is being made; wait for it, or stop it.", title="Not now",
                           print_exception=False)  # fmt: skip
        self.stops[str(request.session_hash)] = threading.Event()
        waits = "Waiting for another page's picture ..."
        news = waits if self.generator.is_busy else "Opening the run ..."
        empty = {field: views.stage(unet, size) for unet, field, size in self._stages()}
        return {
            self.start: gr.Button(interactive=False),
            self.stop: gr.Button(interactive=True),
            self.status: views.status([news]),
            **empty,
        }

    def generate(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """One picture, told of as it is made."""
        session = str(request.session_hash)
        stop = self.stops.setdefault(session, threading.Event())
        said: list[str] = []
        began = time.perf_counter()
        fields = {unet: (field, size) for unet, field, size in self._stages()}
        try:
            for event in self.generator.generate(self.form.read(values), stop):
                match event:
                    case Said(sentence):
                        said.append(sentence)
                    case Step(unet, done, steps, image):
                        field, size = fields[unet]
                        now = views.stage(unet, size, image, done=done, steps=steps)
                        yield {field: now, self.status: views.status(["Denoising ...", *said])}
                    case Made(path):
                        text = f"{time.perf_counter() - began:.1f} s, kept as {views.place(path)}"
                        yield {
                            self.status: views.status([text, *said], "good"),
                            **self.history(),
                            **self.details_of(path),
                        }
                    case Stopping():
                        yield {self.status: views.status(["Stopping after this step ..."])}
                    case Stopped():
                        yield {self.status: views.status(["Stopped; nothing was kept."])}
                    case Failed(message):
                        yield {self.status: views.status([message, *said], "bad")}
        finally:
            self.stops.pop(session, None)

    def end(self) -> dict[Any, Any]:
        """After a picture, whatever became of it."""
        return {self.start: gr.Button(interactive=True), self.stop: gr.Button(interactive=False)}

    def halt(self, request: gr.Request) -> None:
        """Asks for the end of what this page makes; `generate` tells of it, in its order."""
        if stop := self.stops.get(str(request.session_hash)):
            stop.set()

    def halt_all(self) -> None:
        """Asks for the end of everything, before the program ends."""
        for stop in list(self.stops.values()):
            stop.set()

    def history(self) -> dict[Any, Any]:
        """The pictures on disk."""
        found = read_history(self.samples)
        entries = found.entries
        return {
            self.line: views.history_line(found),
            self.gallery: [(str(one.path.resolve()), views.caption(one)) for one in entries],
            self.shown: [str(one.path) for one in entries],
        }

    def select(self, shown: list[str], event: gr.SelectData) -> dict[Any, Any]:
        """A picture of the gallery was clicked."""
        return self.details_of(Path(shown[event.index]))

    def details_of(self, path: Path) -> dict[Any, Any]:
        """What one picture was made from, and its command."""
        entry = self._entry(path)
        command = "" if entry is None else sample_command(
            entry.facts, self.run.folder, num_unets=self.num_unets,
            thresholds=[stage.threshold for stage in self.own],
            allow_unfinished=self.run.allow_unfinished,
        )  # fmt: skip
        return {
            self.selected: None if entry is None else str(path),
            self.details: views.details(entry),
            self.command: gr.Code(command, visible=entry is not None),
            self.reuse: gr.Button(visible=entry is not None),
        }

    def take(self, selected: str | None) -> dict[Any, Any]:
        """Fills the form with the selected picture's settings."""
        entry = None if selected is None else self._entry(Path(selected))
        return {} if entry is None else self.form.fill(entry.facts)

    def _entry(self, path: Path) -> Entry | None:
        return next((one for one in read_history(self.samples).entries if one.path == path), None)

    def _stages(self) -> list[tuple[int, Any, int]]:
        """Number, field and pixels of each."""
        pairs = zip(self.stages, self.sizes, strict=True)
        return [(unet, field, size) for unet, (field, size) in enumerate(pairs, start=1)]
