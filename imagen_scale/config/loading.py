"""Reading a configuration: JSON text, overrides, and every problem at once."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from imagen_scale.config.explain import explain_all
from imagen_scale.config.recipes import fill_in
from imagen_scale.config.rules import cross_checks
from imagen_scale.config.schema import Config
from imagen_scale.config.secret_values import secret_problems
from imagen_scale.config.strict_json import parse_json
from imagen_scale.errors import ConfigError

MAX_LENGTH = 1_000_000  # characters of a file
MAX_DEPTH = 20  # names of one key


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Reads and checks a configuration file.

    Args:
        path: The JSON file.
        overrides: `a.b=value` strings, the value in JSON (a bare word is taken as a string).

    Raises:
        ConfigError: With every problem found, each with its key path and remedy.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_LENGTH + 1)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}. Give a JSON file.") from None
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"{path}: longer than {MAX_LENGTH:,} characters; give a configuration.")
    return parse_config(text, source=str(path), overrides=overrides)


def parse_config(text: str, source: str = "config", overrides: tuple[str, ...] = ()) -> Config:
    """Checks a configuration given as JSON text; see `load_config`."""
    try:
        data = parse_json(text)
        if isinstance(data, dict):
            for override in overrides:
                _apply_override(data, override)
            data = parse_json(json.dumps(data))  # what came with the overrides, too
    except ValueError as error:
        raise ConfigError(f"{source}: not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{source}: holds a {type(data).__name__}; a configuration is an object with the "
            f"sections {', '.join(Config.model_fields)}."
        )
    # First and alone: other messages repeat what they saw.
    if secrets := secret_problems(data):
        raise _config_error(source, secrets)
    if nul := next((text for text in _texts(data) if "\0" in text), None):
        raise ConfigError(f"{source}: {nul[:20]!a}: holds a NUL, as no path may; remove it.")
    data = fill_in(data)
    try:
        # Through JSON again: its strict mode takes a list for a tuple, Python's does not.
        config = Config.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise _config_error(source, explain_all(error.errors(), Config)) from None
    problems = cross_checks(config)
    if problems:
        raise _config_error(source, problems)
    return config


def dump_config(config: Config) -> str:
    """The configuration as JSON text that `parse_config` reads back to the same value."""
    return config.model_dump_json(indent=2) + "\n"


def _texts(node: Any) -> Iterator[str]:
    """Every string in JSON data, keys among them."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        inner = chain(*node.items()) if isinstance(node, dict) else node
        yield from chain.from_iterable(map(_texts, inner))


def _config_error(source: str, problems: list[str]) -> ConfigError:
    return ConfigError("\n".join(f"{source}: {problem}" for problem in problems))


def _apply_override(data: dict[str, Any], override: str) -> None:
    key_path, equals, raw = override.partition("=")
    keys = key_path.split(".")
    if not equals or not all(keys) or len(keys) > MAX_DEPTH:
        raise ConfigError(f"--set {key_path[:80]}: write section.key=value, e.g. training.seed=1.")
    try:
        value = parse_json(raw)
    except ValueError:
        value = raw
    node: Any = data
    for depth, key in enumerate(keys):
        is_last = depth == len(keys) - 1
        where = ".".join(keys[: depth + 1])
        if isinstance(node, list):
            if key not in map(str, range(len(node))):
                raise ConfigError(
                    f"--set {key_path}: {where} does not exist; the list has {len(node)} "
                    f"entries, numbered from 0."
                )
            place: int | str = int(key)
        elif isinstance(node, dict):
            place = key
            if not is_last and node.get(key) is None:  # null is where a section may stand
                node[key] = {}
        else:
            outer = ".".join(keys[:depth])
            raise ConfigError(
                f"--set {key_path}: {outer} is a plain value, with nothing inside; set {outer} "
                f"itself."
            )
        if is_last:
            node[place] = value
        else:
            node = node[place]
