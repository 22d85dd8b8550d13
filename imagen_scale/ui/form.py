"""The fields of the page: laid out, read, and filled from a picture that was made before."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from imagen_scale.config.distillation import FewSteps
from imagen_scale.sampling.option_facts import OptionFacts, facts_of
from imagen_scale.sampling.options import SamplingOptions, StageSettings, learned_settings
from imagen_scale.sampling.runtimes.options import RuntimeName, RuntimeOptions
from imagen_scale.ui.generation import Request
from imagen_scale.ui.history import Facts

OPTIONS = {facts.name: facts for facts in facts_of(SamplingOptions)}
# One picture is made at a time, whole where it can be; these are for calls that make many.
NOT_OFFERED = ("num", "tile", "at_once")
FIRST = ("steps", "cond_scale")  # a field for each stage, in sight; the others are folded away


class Form:
    """The fields, placed where they are made: the options of sampling, and the prompt.

    Args:
        sizes: Side of each stage's pictures in pixels.
        runtime: Chosen at first.
        own: How each stage is sampled where nothing is asked for.
        few: Of stages that take few steps, by their number, how they learned it.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        runtime: RuntimeName,
        own: Sequence[StageSettings],
        few: Mapping[int, FewSteps] | None = None,
    ) -> None:
        self.own, self.few = own, few or {}
        self.prompt = gr.Textbox(
            label="Prompt", placeholder="red heart", max_lines=4, autofocus=True, elem_id="prompt"
        )
        negative = OPTIONS["negative_prompt"]
        # Each option's fields: one, or one for each stage.
        self.options: dict[str, list[Any]] = {
            negative.name: [
                gr.Textbox(
                    label=negative.label, info=negative.description, max_lines=4,
                    elem_id="negative",
                )
            ]
        }  # fmt: skip
        self.options |= {name: [] for name in FIRST}
        for unet, size in enumerate(sizes, start=1):
            with gr.Row(equal_height=True, elem_classes="is-pair"):
                for name in FIRST:
                    self.options[name].append(
                        _number(OPTIONS[name], unet, size, self.few.get(unet))
                    )
        names = next(facts for facts in facts_of(RuntimeOptions) if facts.name == "runtime")
        with gr.Row(equal_height=True, elem_classes="is-pair"):
            self.options["seed"] = [
                gr.Number(0, label=OPTIONS["seed"].label, precision=0, min_width=110,
                          elem_id="seed")
            ]  # fmt: skip
            self.runtime = gr.Dropdown(
                list(names.choices), value=runtime, label=names.label, min_width=110,
                elem_id="runtime",
            )  # fmt: skip
        with gr.Accordion("Sampler", open=False), gr.Row():
            for facts in OPTIONS.values():
                if facts.name not in (*self.options, *NOT_OFFERED):
                    self.options[facts.name] = [_folded(facts)]

    @property
    def seed(self) -> Any:
        """The field of the seed."""
        return self.options["seed"][0]

    @property
    def negative(self) -> Any:
        """The field of the negative prompt."""
        return self.options["negative_prompt"][0]

    @property
    def fields(self) -> list[Any]:
        """All of them, in the order that `read` and `fill` use."""
        return [
            self.prompt, self.runtime, *(field for fields in self.options.values()
                                         for field in fields),
        ]  # fmt: skip

    def read(self, values: Sequence[Any]) -> Request:
        """The fields' values as a request."""
        prompt, runtime, *rest = values
        options: dict[str, Any] = {}
        for name, fields in self.options.items():
            own, rest = rest[: len(fields)], rest[len(fields) :]
            # A field that is left as it is asks for nothing.
            if name in (*FIRST, "seed") or own[0] not in (OPTIONS[name].default, ""):
                options[name] = own if name in FIRST else self._asked(name, own[0])
        options["negative_prompt"] = (options.get("negative_prompt") or "").strip()
        return Request((prompt or "").strip(), options, runtime)

    def fill(self, facts: Facts) -> dict[Any, Any]:
        """Values that ask for a picture again, as far as there are fields for it."""
        values: dict[Any, Any] = {
            self.prompt: facts.prompt,
            self.negative: facts.negative_prompt or "",
            self.seed: facts.seed,
        }
        for name, fields in self.options.items():
            if not OPTIONS[name].per_stage:
                continue
            if name not in FIRST:
                values[fields[0]] = self._for_all(name, facts)
                continue
            for field, stage in zip(fields, facts.stages, strict=False):
                values[field] = getattr(stage, name)
        return values

    def _asked(self, name: str, value: Any) -> Any:
        """A folded field's value: for the stages that leave a choice, if others do not."""
        if not (self.few and OPTIONS[name].per_stage):
            return value
        return [
            getattr(learned_settings(self.few[unet]), name) if unet in self.few else value
            for unet in range(1, len(self.own) + 1)
        ]

    def _for_all(self, name: str, facts: Facts) -> Any:
        """One field's value for all stages that leave a choice: none where they took their own."""
        default, choices = OPTIONS[name].default, OPTIONS[name].choices
        pairs = [
            (getattr(stage, name), getattr(own, name))
            for unet, (stage, own) in enumerate(zip(facts.stages, self.own, strict=False), 1)
            if unet not in self.few
        ]
        asked = [value for value, own in pairs if value != own]
        return asked[0] if asked and (not choices or asked[0] in choices) else default


def _number(facts: OptionFacts, unet: int, size: int, few: FewSteps | None) -> Any:
    """A field of one stage; guidance is the base stage's alone, and of few steps built in."""
    value = 1.0 if facts.name == "cond_scale" and unet > 1 else facts.default
    if few is not None:
        value = getattr(learned_settings(few), facts.name)
    return gr.Number(
        value,
        label=f"{facts.label}, {size} px",
        precision=0 if facts.kind is int else None,
        step=1 if facts.kind is int else 0.5,
        min_width=110,
        elem_id=f"{facts.name}{unet}",
        interactive=few is None,
        info=None if few is None else f"learned; guidance {few.cond_scale:g} is built in",
    )


def _folded(facts: OptionFacts) -> Any:
    """A field for all stages together."""
    if facts.choices:
        return gr.Dropdown(
            list(facts.choices), value=facts.default, label=facts.label, min_width=110,
            elem_id=facts.name,
        )  # fmt: skip
    kind = gr.Textbox if facts.kind is str else gr.Number
    return kind(
        facts.default, label=facts.label, info=facts.description, min_width=110,
        elem_id=facts.name,
    )  # fmt: skip
