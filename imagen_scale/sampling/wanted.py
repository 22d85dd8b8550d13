"""A picture that is asked for; imagen-scale-runtime carries the same file."""

from typing import NamedTuple


class Wanted(NamedTuple):
    """One picture that is to be made."""

    prompt: str
    seed: int
    cond_scales: tuple[float, ...] | None = None  # of each stage; None: as the settings say
