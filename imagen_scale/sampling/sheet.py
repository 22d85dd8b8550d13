"""One or two options varied, all else equal: what a sheet shows."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

from imagen_scale.errors import UsageError, option
from imagen_scale.sampling.option_facts import OptionFacts, facts_of
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.options import EXPORTED, RuntimeOptions

PROMPT = "prompt"
CHECKPOINT = OptionFacts(
    "checkpoint", "Checkpoint",
    "Steps of checkpoints whose averaged weights draw; all takes every one that was kept, last is "
    "the end of training. A single value is the base stage's.",
    "last", True, str, (), None, None,
)  # fmt: skip
VARIED = [
    *(
        facts
        for facts in facts_of(SamplingOptions) + facts_of(RuntimeOptions)
        if facts.name not in ("num", "at_once") and facts.kind is not bool
    ),
    CHECKPOINT,
]
MOST = 100  # pictures of a sheet


class Axis(NamedTuple):
    """An option and the values that it takes along a side of the sheet."""

    name: str
    values: list[Any]

    @property
    def captions(self) -> list[str]:
        """What is written beside each."""
        if self.name == PROMPT:
            return [" ".join(str(value).split()) for value in self.values]
        label = {"cond_scale": "guidance"}.get(self.name, self.name.replace("_", " "))
        return [f"{label} {_text(value)}" for value in self.values]


class Cell(NamedTuple):
    """One picture."""

    prompt: str
    options: SamplingOptions
    runtime: RuntimeOptions
    checkpoint: Any = "last"  # a step or "last", or a list with one for each stage

    @property
    def steps(self) -> dict[int, int]:
        """By the number of a U-Net the step of its checkpoint; none of those as training ended."""
        each = self.checkpoint if isinstance(self.checkpoint, list) else [self.checkpoint]
        return {unet: step for unet, step in enumerate(each, 1) if step != "last"}


class Plan(NamedTuple):
    """What is drawn where."""

    columns: Axis
    rows: Axis | None
    cells: list[list[Cell]]  # by row, then by column


def values_of(
    facts: OptionFacts, text: str, kept: Callable[[int], list[int]] = lambda unet: []
) -> list[Any]:
    """Values of an option: commas between those of the sheet, slashes between those of stages.

    Args:
        facts: The option.
        text: As it was written.
        kept: Gives the steps of a U-Net's checkpoints.

    Raises:
        UsageError: If one is no number where numbers are needed.
    """
    convert: Callable[[str], Any] = facts.kind
    if facts is CHECKPOINT:
        return _checkpoints(text, kept)
    if facts.name == "negative_prompt":  # words hold both signs
        return [text]

    def read(one: str) -> Any:
        return None if one == "none" and facts.default is None else convert(one)

    try:
        cells = [[read(one.strip()) for one in cell.split("/")] for cell in text.split(",")]
    except ValueError:
        raise UsageError(
            f"{option(facts.name)} {text!r}: write numbers, with commas between the values of the "
            f"sheet and slashes between those of the stages, as in 25/10,50/20."
        ) from None
    return [cell[0] if len(cell) == 1 else cell for cell in cells]


def plan_sheet(prompts: Sequence[str], varied: dict[str, list[Any]]) -> Plan:
    """Columns, rows and every picture of a sheet.

    Args:
        prompts: One or several.
        varied: By option, its values; those of one value are the same for all pictures.

    Raises:
        UsageError: If more than two have several values, or an option is wrong.
    """
    given = {PROMPT: list(prompts), **varied}
    axes = [Axis(name, values) for name, values in given.items() if len(values) > 1]
    if len(axes) > 2:
        raise UsageError(
            f"{', '.join(option(axis.name) for axis in axes)}: {len(axes)} options with several "
            f"values; a sheet has two sides."
        )
    axes = axes or [Axis(PROMPT, list(prompts))]
    # The longer captions stand before rows: prompts, where they are varied with something else.
    rows = axes[0] if len(axes) == 2 else None
    columns = axes[-1]
    if len(columns.values) * (len(rows.values) if rows else 1) > MOST:
        raise UsageError(f"a sheet of more than {MOST} pictures cannot be looked at; take fewer.")
    made = []
    for row in rows.values if rows else [None]:
        line = []
        for value in columns.values:
            one = {name: values[0] for name, values in given.items()}
            one |= {columns.name: value} | ({rows.name: row} if rows else {})
            runtime = {
                name: one.pop(name) for name in list(one) if name in RuntimeOptions.model_fields
            }
            prompt, checkpoint = one.pop(PROMPT), one.pop(CHECKPOINT.name, CHECKPOINT.default)
            line.append(
                Cell(
                    prompt, SamplingOptions.make(**one), RuntimeOptions.make(**runtime), checkpoint
                )
            )
        made.append(line)
    if any(cell.steps for line in made for cell in line):
        made = [[_without_export(cell) for cell in line] for line in made]
    return Plan(columns, rows, made)


def title(plan: Plan, varied: dict[str, list[Any]]) -> str:
    """What all pictures have in common."""
    sides = {plan.columns.name, plan.rows.name if plan.rows else ""}
    common = [
        Axis(name, values).captions[0]
        for name, values in varied.items()
        if name not in sides and values
    ]
    prompt = [] if PROMPT in sides else [plan.cells[0][0].prompt]
    return ", ".join([*prompt, *common])


def positions(plan: Plan) -> list[tuple[int, int]]:
    """Row and column of every picture, in order."""
    return list(product(range(len(plan.cells)), range(len(plan.columns.values))))


def _without_export(cell: Cell) -> Cell:
    """A picture of a sheet over checkpoints: torch computes all, as an export has one step's.

    Raises:
        UsageError: If an export is asked for.
    """
    if cell.runtime.runtime in EXPORTED:
        raise UsageError(
            f"{option('runtime')} {cell.runtime.runtime}: an export holds the weights that it was "
            f"made of; {option(CHECKPOINT.name)} goes with torch and compile."
        )
    if cell.runtime.runtime == "auto":
        return cell._replace(runtime=cell.runtime.changed(runtime="torch"))
    return cell


def _checkpoints(text: str, kept: Callable[[int], list[int]]) -> list[Any]:
    """Values of `CHECKPOINT`, with what "all" stands for.

    Raises:
        UsageError: If one is neither a step nor a word that is known, or nothing was kept.
    """
    values: list[Any] = []
    for cell in text.split(","):
        stages: list[Any] = [one.strip() for one in cell.split("/")]
        if stages.count("all") > 1 or not all(
            one.isdecimal() or one in ("all", "last") for one in stages
        ):
            raise UsageError(
                f"{option(CHECKPOINT.name)} {text!r}: write steps, all or last, with commas "
                f"between the values of the sheet and slashes between those of the stages, as in "
                f"500,1000,last or last/all."
            )
        stages = [int(one) if one.isdecimal() else one for one in stages]
        expanded = [stages]
        if "all" in stages:
            place = stages.index("all")
            steps = kept(place + 1)
            if not steps:
                raise UsageError(
                    f"{option(CHECKPOINT.name)} all: U-Net {place + 1} has no checkpoint; "
                    f"training.keep_every keeps those of a training."
                )
            expanded = [[*stages[:place], step, *stages[place + 1 :]] for step in steps]
        values += [one[0] if len(one) == 1 else one for one in expanded]
    return values


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(_text, value))
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
