"""Options that have a value for each stage; imagen-scale-runtime carries the same file."""

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError, option


def columns_of(values: Mapping[str, Any], stages: int) -> dict[str, list[Any]]:
    """Each option's value for each stage: a list has one of its own, a single value counts for all.

    A single `cond_scale` is the base stage's, and the others take 1: the low-resolution picture
    already says what to draw.

    Args:
        values: By name; None is left for the caller to fill.
        stages: How many.

    Raises:
        UsageError: If a list is as long as no cascade of so many stages.
    """
    columns: dict[str, list[Any]] = {}
    for name, value in values.items():
        if not isinstance(value, (list, tuple)):
            columns[name] = [value] * stages
            if name == "cond_scale" and value is not None:
                columns[name][1:] = [1.0] * (stages - 1)
        elif len(value) == stages:
            columns[name] = list(value)
        else:
            raise UsageError(
                f"{option(name)}: {len(value)} values for {stages} stage(s). Give one per stage, "
                f"or a single one."
            )
    return columns
