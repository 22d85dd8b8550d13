"""What a page's sheet asks for."""

from collections.abc import Callable
from typing import Any

from imagen_scale.errors import UsageError
from imagen_scale.sampling.sheet import VARIED, values_of

BY_LABEL = {facts.label: facts for facts in VARIED}


def asked(
    varied: dict[str, str], options: dict[str, Any], kept: Callable[[int], list[int]]
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """What is varied, and that together with all that is the same for every picture.

    Args:
        varied: By option, its values as they were written.
        options: One value of each other option.
        kept: Gives the steps of a U-Net's checkpoints.

    Raises:
        UsageError: If nothing is varied, or a value is wrong.
    """
    by_name = {facts.name: facts for facts in VARIED}
    values = {name: values_of(by_name[name], text, kept) for name, text in varied.items()}
    if all(len(found) < 2 for found in values.values()):
        raise UsageError("a sheet compares several values; write them with commas, as in 1, 3, 5.")
    return values, {name: [value] for name, value in options.items()} | values
