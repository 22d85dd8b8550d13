"""What is known of an option from its field: for command lines, pages and signatures."""

import types
import typing
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel


class OptionFacts(NamedTuple):
    """What a face needs to know of an option to offer it."""

    name: str
    label: str
    description: str
    default: Any
    per_stage: bool
    kind: type  # int, float, bool or str
    choices: tuple[str, ...]  # of a str; empty for any text
    least: float | None
    most: float | None

    @property
    def sentence(self) -> str:
        """What it means, and what it may be where that is a choice among names."""
        if not self.choices:
            return self.description
        return f"{self.description} One of {', '.join(self.choices)}."

    @property
    def annotation(self) -> str:
        """Its type as Python would write it."""
        name = self.kind.__name__
        each = f"{name} | list[{name}]" if self.per_stage else name
        return each if self.default is not None else f"{each} | None"


def facts_of(model: type[BaseModel]) -> list[OptionFacts]:
    """The options that a model holds, in order."""
    return [_facts(name, field) for name, field in model.model_fields.items()]


def _facts(name: str, field: Any) -> OptionFacts:
    kinds: list[type] = []
    choices: tuple[str, ...] = ()
    least = most = None
    is_per_stage = False

    def look(annotation: Any) -> None:
        nonlocal choices, least, most, is_per_stage
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is tuple:
            is_per_stage = True
        elif origin is Literal:
            choices += arguments
            kinds.append(str)
        elif origin in (typing.Union, types.UnionType):
            for argument in arguments:
                look(argument)
        elif origin is Annotated:
            look(arguments[0])
            for extra in arguments[1:]:
                for bound in getattr(extra, "metadata", ()):
                    least = getattr(bound, "ge", least)
                    most = getattr(bound, "le", most)
        elif annotation is not types.NoneType:
            kinds.append(annotation)

    look(field.annotation)
    for bound in field.metadata:  # pydantic takes those of the outermost Annotated out
        least, most = getattr(bound, "ge", least), getattr(bound, "le", most)
    label = field.title or name.replace("_", " ").capitalize()
    return OptionFacts(
        name, label, field.description, field.default, is_per_stage, kinds[0], choices, least, most
    )
