"""The sheet on the page: which one or two options are varied, and what happens at its button."""

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from imagen_scale.ui import views
from imagen_scale.ui.generation import Drawn, Failed, Made, Said, Stopped, Stopping
from imagen_scale.ui.sheet_values import BY_LABEL

if TYPE_CHECKING:
    from imagen_scale.ui.page import Page

SIDES = ("across", "down")


class SheetForm:
    """The fields, placed where they are made; all else is as the form has it."""

    def __init__(self) -> None:
        self._sides: list[tuple[Any, Any]] = []
        with gr.Accordion("Sheet", open=False):
            for side, label in zip(SIDES, ("Guidance", "Steps"), strict=True):
                with gr.Row(equal_height=True, elem_classes="is-pair"):
                    chosen = label if label in BY_LABEL else next(iter(BY_LABEL))
                    option = gr.Dropdown(
                        list(BY_LABEL), value=chosen, label=f"Varied {side}", min_width=110,
                        elem_id=f"varied-{side}",
                    )  # fmt: skip
                    values = gr.Textbox(
                        label="Values", placeholder="1, 3, 5", max_lines=1, min_width=110,
                        info="commas between them, slashes between those of the stages",
                        elem_id=f"values-{side}",
                    )  # fmt: skip
                self._sides.append((option, values))
            self.start = gr.Button("Make sheet", elem_id="sheet")

    @property
    def fields(self) -> list[Any]:
        """All of them, in the order that `read` uses."""
        return [field for side in self._sides for field in side]

    @staticmethod
    def read(values: Sequence[Any]) -> dict[str, str]:
        """The values as they were written, by option; those that were left empty are none."""
        pairs = zip(values[::2], values[1::2], strict=True)
        given = [(BY_LABEL[label].name, text) for label, text in pairs if (text or "").strip()]
        return dict(given)

    def connect(
        self, page: "Page", before: list[Any], history: list[Any], at_once: dict[str, Any]
    ) -> None:
        """Says what the button does: one sheet at a time, and none beside a picture.

        Args:
            page: Whose form the sheet is made from.
            before: What `page.begin` fills.
            history: What shows the pictures on disk.
            at_once: How a step is called that takes no time.
        """
        self.page = page
        self.start.click(page.begin, None, before, **at_once).success(
            self.make, [*page.form.fields, *self.fields], [page.status, page.sheet, *history],
            concurrency_limit=1, concurrency_id="made", show_progress="hidden", api_name="sheet",
        ).then(page.end, None, before[:2], **at_once)  # fmt: skip

    def make(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """A sheet, told of picture by picture."""
        page, session = self.page, str(request.session_hash)
        stop = page.stops.setdefault(session, threading.Event())
        count, said = len(page.form.fields), list[str]()
        asked = page.form.read(values[:count])._replace(varied=self.read(values[count:]))
        try:
            for event in page.generator.generate(asked, stop):
                match event:
                    case Said(sentence):
                        said.append(sentence)
                    case Drawn(done, pictures):
                        news = f"Picture {done + 1} of {pictures} ..."
                        yield {page.status: views.status([news, *said])}
                    case Made(path):
                        text = f"Sheet, kept as {views.place(path)}"
                        yield {
                            page.status: views.status([text, *said], "good"),
                            page.sheet: views.sheet(path),
                            **page.history(),
                        }
                    case Stopping():
                        yield {page.status: views.status(["Stopping after this picture ..."])}
                    case Stopped():
                        yield {page.status: views.status(["Stopped; nothing was kept."])}
                    case Failed(message):
                        yield {page.status: views.status([message, *said], "bad")}
        finally:
            page.stops.pop(session, None)
