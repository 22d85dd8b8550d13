"""The fields of a sheet: which one or two options are varied, and their values."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from imagen_scale.ui.sheet_values import BY_LABEL

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
