"""Problems that pydantic finds, each as one sentence: key path, what was seen, what is allowed."""

import difflib
import json
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

_UNION_MARKS = ("int", "float", "bool", "tuple[", "constrained-", "literal[")


def explain_all(errors: list[Any], model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every pydantic error in one sentence, without its reports of the branch not meant.

    A 'one value, or a list' key fails both as a value and as a list, and a list with a bad entry
    is also called too short: neither helps.

    Args:
        errors: From `ValidationError.errors()`.
        model: What was validated.
        prefix: Key path of the whole, e.g. "deepspeed."; empty for a file.
    """
    problems: dict[str, None] = {}  # a dict keeps the order and drops what comes twice
    for details in errors:
        # A union reports each branch one level below the field: keep the field.
        is_list = isinstance(details["input"], list)
        if details["type"] == "tuple_type" or _is_echo(details):
            continue
        marks = [part for part in details["loc"] if str(part).startswith(_UNION_MARKS)]
        if marks and is_list and not str(marks[0]).startswith("tuple["):
            continue
        location = [part for part in details["loc"] if part not in marks]
        problems[prefix + _explain(location, details, model)] = None
    if not problems:  # the key takes nothing but a list
        meant = [details for details in errors if not _is_echo(details)]
        sentences = [_explain(list(details["loc"]), details, model) for details in meant]
        problems = {prefix + sentence: None for sentence in sentences}
    return list(problems)


def unknown_key(path: str, known: Sequence[str]) -> str:
    """The sentence about a key that does not exist, with the one that was probably meant."""
    close = difflib.get_close_matches(path.rpartition(".")[2], known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{path}: unknown key; {hint}Known keys: {', '.join(known)}."


def shortened(value: Any) -> str:
    """A value as JSON, short enough to stand in a sentence."""
    seen = json.dumps(value, default=str)
    return seen if len(seen) <= 60 else seen[:57] + "..."


def _is_echo(details: Any) -> bool:
    """Whether a list is called too short only because its entries are wrong."""
    return details["type"] == "too_short" and bool(details["input"])


def _explain(location: list[Any], details: Any, model: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in location)
    if details["type"] == "extra_forbidden":
        return unknown_key(path, _keys_at(model, location[:-1]))
    if details["type"] == "missing":
        return f"{path}: this key is required; add it."
    if details["type"] in ("model_type", "model_attributes_type"):
        keys = ", ".join(_keys_at(model, location))
        return f"{path}: {shortened(details['input'])} is not an object; its keys are {keys}."
    reason = details["msg"].removeprefix("Value error, ").rstrip(".")
    _, should, rest = reason.partition("should ")  # pydantic's own: "Input should be ..."
    if details["type"] != "value_error" and should:
        reason = f"it should {rest}"
    if details["type"] == "string_type" and isinstance(details["input"], int | float):
        reason += f'; write it in quotes, "{details["input"]}"'
    return f"{path}: {shortened(details['input'])} is not allowed: {reason}."


def _keys_at(model: type[BaseModel], location: list[Any]) -> list[str]:
    """Known keys of the section at `location`, e.g. ['unets', 0]."""
    for part in location:
        if not isinstance(part, int):
            fields = {field.alias or name: field for name, field in model.model_fields.items()}
            model = _section(fields[part].annotation)
    return [field.alias or name for name, field in model.model_fields.items()]


def _section(annotation: Any) -> Any:
    """The section inside an annotation such as `tuple[UnetConfig, ...]` or `WandbConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_section(argument) for argument in typing.get_args(annotation))
    return next((section for section in found if section is not None), None)
