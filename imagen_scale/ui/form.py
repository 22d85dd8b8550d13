"""The fields of the page: laid out, read, and filled from a picture that was made before."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from imagen_scale.diffusion.sampler import SAMPLERS
from imagen_scale.diffusion.spacing import SPACINGS
from imagen_scale.sampling.runtimes.contract import RUNTIMES, RuntimeName
from imagen_scale.ui.generation import Request
from imagen_scale.ui.history import Facts

DEFAULT_STEPS = 25
DEFAULT_SCALE = 3.0  # of the base stage; the others take 1


class Form:
    """The fields, placed where they are made.

    Args:
        sizes: Side of each stage's pictures in pixels.
        runtime: Chosen at first.
    """

    def __init__(self, sizes: Sequence[int], runtime: RuntimeName) -> None:
        self.prompt = gr.Textbox(
            label="Prompt", placeholder="red heart", max_lines=4, autofocus=True, elem_id="prompt"
        )
        self.negative = gr.Textbox(
            label="Negative prompt", info="What guidance leads away from; torch computes it.",
            max_lines=4, elem_id="negative",
        )  # fmt: skip
        self.steps, self.scales = [], []
        for unet, size in enumerate(sizes, start=1):
            with gr.Row(equal_height=True, elem_classes="is-pair"):
                self.steps.append(
                    gr.Number(
                        DEFAULT_STEPS, label=f"Steps, {size} px", precision=0, min_width=110,
                        elem_id=f"steps{unet}",
                    )
                )  # fmt: skip
                self.scales.append(
                    gr.Number(
                        DEFAULT_SCALE if unet == 1 else 1.0, label=f"Guidance, {size} px",
                        step=0.5, min_width=110, elem_id=f"scale{unet}",
                    )
                )  # fmt: skip
        with gr.Row(equal_height=True, elem_classes="is-pair"):
            self.seed = gr.Number(0, label="Seed", precision=0, min_width=110, elem_id="seed")
            self.runtime = gr.Dropdown(
                list(RUNTIMES), value=runtime, label="Runtime", min_width=110, elem_id="runtime"
            )
        with gr.Accordion("Sampler", open=False), gr.Row():
            self.sampler = gr.Dropdown(
                list(SAMPLERS), value="dpmpp_2m", label="Sampler", min_width=110
            )
            self.spacing = gr.Dropdown(
                list(SPACINGS), value="trailing", label="Spacing", min_width=110
            )

    @property
    def fields(self) -> list[Any]:
        """All of them, in the order that `read` and `fill` use."""
        return [
            self.prompt, self.negative, self.seed, self.runtime, self.sampler, self.spacing,
            *self.steps, *self.scales,
        ]  # fmt: skip

    def read(self, values: Sequence[Any]) -> Request:
        """The fields' values as a request."""
        prompt, negative, seed, runtime, sampler, spacing, *numbers = values
        stages = len(self.steps)
        settings = {
            "steps": numbers[:stages],
            "cond_scale": numbers[stages:],
            "sampler": sampler,
            "spacing": spacing,
        }
        return Request((prompt or "").strip(), (negative or "").strip(), seed, settings, runtime)

    def fill(self, facts: Facts) -> dict[Any, Any]:
        """Values that ask for a picture again, as far as there are fields for it."""
        first, stages = facts.stages[0], facts.stages[: len(self.steps)]
        values: dict[Any, Any] = {
            self.prompt: facts.prompt,
            self.negative: facts.negative_prompt or "",
            self.seed: facts.seed,
        }
        if first.sampler in SAMPLERS and first.spacing in SPACINGS:
            values |= {self.sampler: first.sampler, self.spacing: first.spacing}
        for field, other, stage in zip(self.steps, self.scales, stages, strict=False):
            values |= {field: stage.steps, other: stage.cond_scale}
        return values
