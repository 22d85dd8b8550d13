"""Averages of the weights whose length is chosen after training.

A power function average of relative width w remembers the last w or so of the training, however
long it was: its weight of step s at step t grows as s^gamma. A few of them kept during training,
and saved now and then, span the averages of other widths nearly exactly.

Source: Karras et al. 2024 (EDM2), arXiv:2312.02696, section 3 and appendix C; here for whole steps,
where the weights are exact.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

WIDEST = 1 / math.sqrt(12)  # of the mean of all steps, gamma 0


class Profile(NamedTuple):
    """An average at a step."""

    step: int  # of the training, from 1
    width: float  # standard deviation of what it remembers, in shares of the training


@lru_cache
def gamma_of(width: float) -> float:
    """The exponent of a relative width in (0, `WIDEST`].

    The width is sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)) (equation 126), which falls in
    gamma: halved until it fits.
    """
    low, high = 0.0, 1.0
    while _width_of(high) > width:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _width_of(middle) > width else (low, middle)
    return high


def decay(step: int, width: float) -> float:
    """What an average keeps of itself at a step, from 1: (1 - 1 / t)^(gamma + 1), equation 127."""
    return (1 - 1 / step) ** (gamma_of(width) + 1)


def weights_of_steps(profile: Profile, steps: int) -> Tensor:
    """What each of the steps 1 to `steps` weighs in an average, (steps,) float64; sums up to 1.

    The decays multiply to (s^(gamma + 1) - (s - 1)^(gamma + 1)) / t^(gamma + 1) up to step t, 0
    after it.
    """
    exponent = gamma_of(profile.width) + 1
    ends = torch.arange(steps + 1, dtype=torch.float64).clamp(max=profile.step) / profile.step
    return ends.pow(exponent).diff()


class Mixture(NamedTuple):
    """How saved averages make up another."""

    coefficients: Tensor  # of each, (N,) float64
    error: float  # norm of the difference of the weights of steps, relative to the wanted one's


def mixture(saved: Sequence[Profile], wanted: Profile) -> Mixture:
    """The mixture of saved averages that comes nearest to a wanted one, by least squares."""
    steps = max(wanted.step, *(profile.step for profile in saved))
    basis = torch.stack([weights_of_steps(profile, steps) for profile in saved], 1)
    target = weights_of_steps(wanted, steps)
    found = torch.linalg.lstsq(basis, target[:, None], driver="gelsd").solution[:, 0]
    error = (basis @ found - target).norm() / target.norm()
    return Mixture(found, error.item())


def _width_of(gamma: float) -> float:
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))
