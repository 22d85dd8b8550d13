"""Options that several commands share."""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import click
from click.core import ParameterSource

from imagen_scale.commands.terminal import Prompt
from imagen_scale.sampling.option_facts import OptionFacts, facts_of
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.options import RuntimeOptions

run_option = click.option("--run", help="Folder of the run; default the newest under runs/.")
unet_limit_option = click.option("--unet-limit", type=int, help="Only the first so many U-Nets.")
unfinished_option = click.option(
    "--allow-unfinished", is_flag=True, help="Accept stages whose training has not ended."
)


def named_here(*names: str) -> list[str]:
    """Of a command's parameters those that stand on its command line, default or not."""
    source = click.get_current_context().get_parameter_source
    return [name for name in names if source(name) is ParameterSource.COMMANDLINE]


def whole_number(text: str) -> int:
    """A number in figures; 0 where it is none, or longer than any that is meant."""
    return int(text) if text.isdecimal() and len(text) < 10 else 0


class Number(click.FloatRange):
    """A float as click takes it, but a finite one."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """The number; "nan" and "inf" are none."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class PerStage(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """One value, or one per stage separated by commas.

    Args:
        item: What a value is.
        may_be_none: Whether a list may leave a stage out, by the word "none".
    """

    def __init__(self, item: Any, *, may_be_none: bool = False) -> None:
        self.item, self.may_be_none = item, may_be_none
        self.name = item.name

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """What the help shows."""
        return f"{self.name.upper()}[,...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """A value, or a list where there is a comma."""
        if not isinstance(value, str):
            return value
        values = [self._one(part.strip(), param, ctx) for part in value.split(",")]
        return values if len(values) > 1 else values[0]

    def _one(self, part: str, param: Any, ctx: Any) -> Any:
        is_none = self.may_be_none and part.lower() == "none"
        return None if is_none else self.item.convert(part, param, ctx)

    def shell_complete(self, ctx: click.Context, param: Any, incomplete: str) -> list[Any]:
        """What the value after the last comma may be."""
        before, comma, last = incomplete.rpartition(",")
        found = self.item.shell_complete(ctx, param, last)
        for item in found:
            item.value = f"{before}{comma}{item.value}"
        return found


def sampling_options(*leave_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What commands that sample take: `SamplingOptions` but for some, and `RuntimeOptions`.

    The command is called with `options` and `runtime`; an option that was not given keeps its
    default.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        offered = [facts for facts in facts_of(SamplingOptions) if facts.name not in leave_out]

        @wraps(command)
        def sampled(**given: Any) -> None:
            def taken(facts: list[OptionFacts]) -> dict[str, Any]:
                values = {one.name: given.pop(one.name) for one in facts}
                return {name: value for name, value in values.items() if value is not None}

            options = SamplingOptions.make(**taken(offered))
            command(options=options, runtime=RuntimeOptions.make(**taken(RUNTIME)), **given)

        wrapped: Callable[..., None] = sampled
        for facts in reversed([*offered, *RUNTIME]):
            wrapped = option_of(facts)(wrapped)
        return wrapped

    return decorate


def runtime_options(command: Callable[..., None]) -> Callable[..., None]:
    """What commands take that hold a runtime; they are called with `runtime`."""

    @wraps(command)
    def computed(**given: Any) -> None:
        values = {one.name: given.pop(one.name) for one in RUNTIME}
        taken = {name: value for name, value in values.items() if value is not None}
        command(runtime=RuntimeOptions.make(**taken), **given)

    wrapped: Callable[..., None] = computed
    for facts in reversed(RUNTIME):
        wrapped = option_of(facts)(wrapped)
    return wrapped


def option_of(facts: OptionFacts) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option of the command line."""
    flag = "--" + facts.name.replace("_", "-")
    if facts.kind is bool:
        return click.option(flag, is_flag=True, help=facts.description)
    kind: Any = {int: click.INT, float: click.FLOAT, str: Prompt()}[facts.kind]
    if facts.choices:
        kind = click.Choice(facts.choices)
    elif facts.kind is int and facts.least is not None:
        kind = click.IntRange(min=int(facts.least))
    # Of a single choice click itself shows the names.
    words = [facts.sentence if facts.per_stage else facts.description]
    if facts.default is not None:
        words.append(f"Default {facts.default}.")
    if facts.per_stage:
        kind = PerStage(kind, may_be_none=facts.default is None)
    return click.option(flag, type=kind, help=" ".join(words))


RUNTIME = facts_of(RuntimeOptions)
runtime_option = option_of(RUNTIME[0])
