"""Single steps of the reverse process, from one noise level to a lower one.

All work on the predicted clean image, so that whatever is done to it (thresholding) counts in
every solver. Coefficients are Python floats: they cost no kernel on a card. Pictures may be arrays
of any library.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from .names import Array


class Level(NamedTuple):
    """A noise level above zero: x = alpha x_0 + sigma eps.

    Where a schedule ends in noise alone, alpha is 0 at the level that sampling starts from.
    """

    time: int
    alpha: float
    sigma: float

    @property
    def half_log_snr(self) -> float:
        """log(alpha / sigma), the lambda of the DPM-Solver papers; -inf of noise alone."""
        return math.log(self.alpha / self.sigma) if self.alpha else -math.inf


class Past(NamedTuple):
    """What a multistep solver remembers of the step before."""

    level: Level
    x_0: Array


def ddim_step(
    x_t: Array,
    x_0: Array,
    level: Level,
    lower: Level,
    *,
    eta: float,
    noise: Array | None,
) -> Array:
    """DDIM; with eta = 1 the DDPM posterior of the two levels. First order.

    Args:
        x_t: Noisy images at `level`, (B, C, H, W).
        x_0: Predicted clean images, (B, C, H, W).
        level: Level of x_t.
        lower: A lower level.
        eta: Share of the posterior's noise that is added, in [0, 1].
        noise: Standard normal, (B, C, H, W); unused when eta = 0.

    Source: Song et al. 2021 (DDIM), arXiv:2010.02502, equations 12 and 16.
    """
    eps = (x_t - level.alpha * x_0) / level.sigma
    kept = level.alpha / lower.alpha
    spread = eta * lower.sigma / level.sigma * math.sqrt(level.sigma**2 - (kept * lower.sigma) ** 2)
    direction = math.sqrt(max(lower.sigma**2 - spread**2, 0))
    x_s = lower.alpha * x_0 + direction * eps
    return x_s if eta == 0 or noise is None else x_s + spread * noise


def dpmpp_2m_step(
    x_t: Array,
    x_0: Array,
    level: Level,
    lower: Level,
    *,
    past: Past | None,
    noise: Array | None,
) -> Array:
    """DPM-Solver++(2M), or its SDE form where noise is given. Second order.

    Without a past it is first order: DDIM, and with noise the DDPM posterior. So it is for the two
    steps after a level of noise alone, which is infinitely far away in log-SNR.

    Args:
        x_t: Noisy images at `level`, (B, C, H, W).
        x_0: Predicted clean images, (B, C, H, W).
        level: Level of x_t.
        lower: A lower level.
        past: The step before.
        noise: Standard normal, (B, C, H, W), for the SDE; None for the ODE.

    Source: Lu et al. 2022 (DPM-Solver++), arXiv:2211.01095, algorithm 2 and appendix B.
    """
    h = lower.half_log_snr - level.half_log_snr
    if past is not None:
        h_past = level.half_log_snr - past.level.half_log_snr
        x_0 = x_0 + h / (2 * h_past) * (x_0 - past.x_0)
    ratio = lower.sigma / level.sigma
    if noise is None:
        return ratio * x_t - lower.alpha * math.expm1(-h) * x_0
    share = -math.expm1(-2 * h)
    drift = ratio * math.exp(-h) * x_t + lower.alpha * share * x_0
    return drift + lower.sigma * math.sqrt(share) * noise


def heun_step(
    x_t: Array,
    x_0: Array,
    level: Level,
    lower: Level,
    *,
    predict: Callable[[Array, Level], Array],
) -> Array:
    """Heun's step of EDM's ODE, with a second evaluation at the lower level. Second order.

    EDM adds noise to a picture of unit scale, z = x_0 + s eps, and solves dz/ds = (z - x_0) / s;
    here z = x_t / alpha and s = sigma / alpha. From noise alone, where s is infinite, the step is
    its first half: DDIM, which does not need z.

    Args:
        x_t: Noisy images at `level`, (B, C, H, W).
        x_0: Predicted clean images, (B, C, H, W).
        level: Level of x_t.
        lower: A lower level.
        predict: Predicts the clean images at a level.

    Source: Karras et al. 2022 (EDM), arXiv:2206.00364, algorithm 1.
    """
    if not level.alpha:
        return ddim_step(x_t, x_0, level, lower, eta=0, noise=None)
    s_level, s_lower = level.sigma / level.alpha, lower.sigma / lower.alpha
    z = x_t / level.alpha
    slope = (z - x_0) / s_level
    euler = z + (s_lower - s_level) * slope
    slope_lower = (euler - predict(lower.alpha * euler, lower)) / s_lower
    return lower.alpha * (z + (s_lower - s_level) * (slope + slope_lower) / 2)
