"""Pictures that are left out, by name and with the reason."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from imagen_scale.errors import DataError

NAMED = 5  # of the files in a note


class Skipped(NamedTuple):
    """A picture, or a row of a list, that is not used."""

    picture: str
    reason: str


@contextmanager
def named(picture: str) -> Iterator[None]:
    """Puts the picture's name before the reason of a DataError."""
    try:
        yield
    except DataError as reason:
        raise DataError(f"{picture}: {reason}") from reason.__cause__


@contextmanager
def noted(picture: str, skipped: list[Skipped]) -> Iterator[None]:
    """Notes a DataError instead of raising it."""
    try:
        yield
    except DataError as reason:
        skipped.append(Skipped(printable(picture), str(reason)))


def printable(name: str) -> str:
    """A name that can be written as UTF-8 on one line; Linux allows any bytes in file names."""
    name = name if len(name) <= 200 else name[:200] + "..."
    visible = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in name)
    return visible.encode("utf-8", "backslashreplace").decode()


def how_often(meant: Mapping[str, int]) -> Iterator[str]:
    """A sentence for each way in which files are not called as they should be.

    Args:
        meant: How many, by words that begin in the plural: "captions are taken from ...".
    """
    for how, count in meant.items():
        if count == 1:
            how = re.sub(r"^(\w+)s\b", r"\1", how)
            for plural, singular in (("are ", "is "), ("differ ", "differs ")):
                how = how.replace(plural, singular)
        yield f"{count:,} {how}."


def counted(names: Sequence[str], singular: str, plural: str) -> str:
    """So many files, with the first of them by name: "2 files are not read: a.zip, b.zip"."""
    first = ", ".join(printable(name) for name in names[:NAMED])
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names):,} {singular if len(names) == 1 else plural}: {first}{more}"
