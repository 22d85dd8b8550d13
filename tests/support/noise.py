"""The noise that a predicted clean picture implies: what runtimes are compared by.

Of a network that predicts noise, the clean picture magnifies what rounds differently by 1 / alpha.
"""

from torch import Tensor

from imagen_scale.diffusion.schedule import NoiseSchedule, at_time


def implied_noise(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
    """eps = (x_t - alpha x_0) / sigma, (B, C, H, W)."""
    alpha, sigma = at_time(schedule.alpha, t, x_t), at_time(schedule.sigma, t, x_t)
    return (x_t - alpha * x_0) / sigma
