"""Numbers of the pictures in a folder, which several processes may write into."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def taken_number(folder: Path, least: int = 1) -> Iterator[int]:
    """A number for a picture that nobody else takes, whoever writes into the folder meanwhile.

    Args:
        folder: Where the picture is written while the number is held.
        least: The first that comes into question.
    """
    number = max(least, next_number(folder))
    while True:
        claim = folder / f".{number:05d}"
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            number += 1
            continue
        try:
            free = next_number(folder)
            if free <= number:  # else somebody wrote one of this number before it was claimed
                yield number
                return
            number = free
        finally:
            claim.unlink(missing_ok=True)


def next_number(folder: Path) -> int:
    """One above the highest picture number in a folder, so that nothing is overwritten."""
    return max((number_of(path) or 0 for path in folder.iterdir()), default=0) + 1


def number_of(path: Path) -> int | None:
    """The number in a picture's name; None in another file's."""
    match = re.match(r"(?:grid_|sheet_)?(\d+)(_[0-9a-f]+)?\.", path.name)
    return int(match[1]) if match else None


def by_number(path: Path) -> tuple[int, str]:
    """Orders pictures as they were made: 100000 comes after 99999, as names do not."""
    return number_of(path) or 0, path.name
