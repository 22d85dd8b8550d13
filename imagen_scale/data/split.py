"""Which pictures are trained on and which are held out: alike ones on the same side."""

import re
from pathlib import PurePosixPath
from typing import NamedTuple

from imagen_scale.config import DataConfig
from imagen_scale.data.sequence import split_indices
from imagen_scale.data.sources.opening import Source
from imagen_scale.errors import DataError


class Split(NamedTuple):
    """Indices of the pictures on each side, each increasing."""

    train: list[int]
    held_out: list[int]


def split(config: DataConfig, source: Source) -> Split:
    """Divides pictures by `data.val_fraction`; those of one group are never parted.

    A group's side depends on its name only, so what else there is never moves it.

    Raises:
        DataError: If `data.val_group` is an expression that is in no key.
    """
    return Split(*split_indices(groups(config, source), config.val_fraction))


def groups(config: DataConfig, source: Source) -> list[str]:
    """The name of each picture's group by `data.val_group`; its own key where it has none.

    Raises:
        DataError: See `split`.
    """
    wanted = config.val_group
    if wanted is None:
        return source.keys
    if wanted == "caption":
        return [f"caption {caption}" for caption in source.captions]
    if wanted == "folder":
        folders = [PurePosixPath(key).parent.as_posix() for key in source.keys]
        if set(folders) <= {"."}:
            raise _no_group(wanted, "all pictures lie in one folder", source)
        return folders
    found = [_found(re.compile(wanted), key) for key in source.keys]
    if not any(found):
        raise _no_group(wanted, "the expression is found in no key", source)
    return [group or key for group, key in zip(found, source.keys, strict=True)]


def _found(expression: re.Pattern[str], key: str) -> str | None:
    """What the first group of an expression took of a key, or else all of it."""
    match = expression.search(key)
    if match is None:
        return None
    return f"group {(match[1] if expression.groups else None) or match[0]}"


def _no_group(wanted: str, why: str, source: Source) -> DataError:
    return DataError(
        f"data.val_group {wanted!r}: {why}; the first is {source.keys[0]!r}. Write caption, "
        f"folder, or a regular expression whose first group is what belongs together, as in "
        f"^(.*)_[0-9]+, or null."
    )
