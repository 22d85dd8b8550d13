"""Classifier-free guidance."""

from collections.abc import Sequence
from typing import Literal

from ..errors import UsageError, option
from .names import Array

Branch = Literal["text", "null"]


def branches(cond_scale: float) -> frozenset[Branch]:
    """Which predictions a guidance scale needs: with the text, without it ("null"), or both."""
    if cond_scale == 1:
        return frozenset({"text"})
    return frozenset({"null"}) if cond_scale == 0 else frozenset({"text", "null"})


def guide(cond: Array, null: Array, cond_scale: float | Array) -> Array:
    """Extrapolates from the unconditional to the conditional prediction.

    It is linear, so it may be done to the noise, to v or to the clean picture.

    Args:
        cond: Prediction with the text, (B, C, H, W).
        null: Prediction without it, same shape.
        cond_scale: 0 is unconditional, 1 conditional, above 1 trades diversity for fidelity;
            a number, or one for each image as (B, 1, 1, 1).

    Source: Ho & Salimans 2022, arXiv:2207.12598, equation 6, with cond_scale = 1 + w.
    """
    return null + (cond - null) * cond_scale


def shares(interval: str) -> tuple[float, float]:
    """From which share of the steps on guidance acts, and until which, of "FROM:UNTIL".

    Raises:
        UsageError: If it is not 0 <= FROM < UNTIL <= 1.
    """
    try:
        start, end = map(float, interval.split(":"))
    except (ValueError, AttributeError):
        start, end = 0.0, 0.0
    if not 0 <= start < end <= 1:
        raise UsageError(
            f"{option('guidance_interval')} {interval}: it should be FROM:UNTIL with 0 <= FROM < "
            f"UNTIL <= 1, like 0.2:1."
        )
    return start, end


def guided_times(times: Sequence[int], interval: str) -> frozenset[int]:
    """The times at which guidance acts: those of the steps whose share is in the interval.

    Step i of n has the share i / n; step 0 begins with noise. At the other times the branch with
    the text stands alone, for half the work.

    Args:
        times: That are visited, falling.
        interval: "FROM:UNTIL", see `shares`.

    Source: Kynkäänniemi et al. 2024, arXiv:2404.07724, equation 5, which counts in sigma.
    """
    start, end = shares(interval)
    return frozenset(time for i, time in enumerate(times) if start <= i / len(times) < end)
