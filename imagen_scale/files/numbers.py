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
    found = (
        re.match(r"(?:grid_|sheet_)?(\d+)(_[0-9a-f]+)?\.", path.name) for path in folder.iterdir()
    )
    return max((int(match[1]) for match in found if match), default=0) + 1
