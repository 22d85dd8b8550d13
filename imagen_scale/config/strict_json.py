"""JSON without its traps: repeated keys, numbers that are not finite, bottomless nesting."""

import json
import math
from typing import Any

MAX_DEPTH = 16  # a configuration needs 5


def parse_json(text: str) -> Any:
    """Parses JSON text.

    Raises:
        ValueError: With the reason, if it is not JSON, or JSON that readers take differently.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=refuse_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        _check(value, MAX_DEPTH)
    except RecursionError:
        raise _too_deep() from None
    return value


def _too_deep() -> ValueError:
    return ValueError(f"nested too deeply; {MAX_DEPTH} levels are allowed")


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook`: an object whose keys stand once each; ValueError otherwise."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in unique if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; remove one")
    return unique


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed; give a finite number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is too large; give a smaller number")
    return number


def _check(value: Any, levels: int) -> None:
    if levels == 0 and isinstance(value, dict | list):
        raise _too_deep()
    if isinstance(value, dict):
        for key, inner in value.items():
            _check(key, levels)
            _check(inner, levels - 1)
    elif isinstance(value, list):
        for inner in value:
            _check(inner, levels - 1)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
            raise ValueError(f"{value[:20]!a} holds a broken character; correct it") from None
