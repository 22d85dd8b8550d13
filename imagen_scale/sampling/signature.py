"""Options as keyword arguments of a Python function: its signature and docstring say them all."""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel

from imagen_scale.sampling.option_facts import facts_of

F = TypeVar("F", bound=Callable[..., Any])
WIDTH = 100  # of a docstring, in characters


def takes(model: type[BaseModel]) -> Callable[[F], F]:
    """Makes a function with `**options` say which: those of a model.

    The line of its docstring about `options`, or however it calls them, becomes a line for each.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        *parameters, rest = signature.parameters.values()
        assert rest.kind is rest.VAR_KEYWORD
        parameters += [
            inspect.Parameter(
                facts.name, rest.KEYWORD_ONLY, default=facts.default, annotation=facts.annotation
            )
            for facts in facts_of(model)
        ]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        before, place, after = (function.__doc__ or "").partition(f"{rest.name}: Of ")
        indent = before.rpartition("\n")[2]
        assert place
        lines = [
            textwrap.fill(f"{facts.name}: {facts.sentence}", WIDTH, initial_indent=indent,
                          subsequent_indent=f"{indent}    ").removeprefix(indent)
            for facts in facts_of(model)
        ]  # fmt: skip
        function.__doc__ = before + f"\n{indent}".join(lines) + "\n" + after.partition("\n")[2]
        return function

    return decorate
