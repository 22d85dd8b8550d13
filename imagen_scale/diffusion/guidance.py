"""Classifier-free guidance."""

from typing import Literal

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
