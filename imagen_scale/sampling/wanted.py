"""A picture that is asked for; imagen-scale-runtime carries the same file."""

from typing import NamedTuple

from ..errors import UsageError, option

SEEDS = 2**63  # there are so many, from 0 on


class Wanted(NamedTuple):
    """One picture that is to be made."""

    prompt: str
    seed: int
    cond_scales: tuple[float, ...] | None = None  # of each stage; None: as the settings say


def check_seeds(seed: int, num: int) -> None:
    """Refuses pictures whose seeds could not be asked for again.

    Args:
        seed: Of the first picture.
        num: Pictures, of a seed each.

    Raises:
        UsageError: If the last one's is none.
    """
    if seed + num > SEEDS:
        raise UsageError(
            f"{option('seed')} {seed}: the last of {num} pictures would have a seed above 2^63 - "
            f"1, where there is none; take a smaller one."
        )
