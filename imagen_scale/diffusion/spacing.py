"""Which times a sampler visits.

A network is trained at the schedule's integer times only. Where a spacing asks for a time in
between, the nearest integer is visited instead, and the solver takes its coefficients at the time
that was visited: rounding moves the steps a little, it adds no error to them.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .names import Spacing

KARRAS_RHO = 7.0
MIDDLE_SNR = 0.02, 500.0  # alpha² / sigma² between which most of a picture is decided


class Levels(Protocol):
    """A schedule, by what is asked of it here; `NoiseSchedule` is one."""

    @property
    def timesteps(self) -> int:
        """Number of diffusion steps T."""
        ...

    @property
    def signal(self) -> Sequence[float]:
        """alpha² of each time."""
        ...


def spaced_times(timesteps: int, steps: int) -> list[int]:
    """`steps` times from T - 1 down to 0, evenly spaced; all of them when steps >= T.

    Both ends are included, so that sampling starts from the noise the network was trained on.
    """
    if steps == 1:
        return [timesteps - 1]
    steps = min(steps, timesteps)
    return [round((timesteps - 1) * (1 - i / (steps - 1))) for i in range(steps)]


def visited_times(schedule: Levels, steps: int, spacing: Spacing) -> list[int]:
    """`steps` distinct times, falling from T - 1; all of them when steps >= T.

    - linear: even in t, both ends included.
    - trailing: even in t from T - 1, stopping T / steps before the end, from where the last step
      goes straight to the clean picture (Lin et al. 2023, arXiv:2305.08891, table 2).
    - logsnr: even in log(alpha / sigma), both ends included (Lu et al. 2022, arXiv:2206.00927,
      section 3.4).
    - karras: even in (sigma / alpha)^(1/7), both ends included (Karras et al. 2022,
      arXiv:2206.00364, equation 5).
    - middle: even in log(alpha / sigma) within `MIDDLE_SNR`, but begun at T - 1; the last step goes
      straight to the clean picture. For few steps, of which none is left to the ends, where
      little is decided.

    Where the schedule ends in noise alone, logsnr and karras are infinite there: T - 1 is visited
    in place of T - 2, with which their even steps begin.

    Args:
        schedule: Noise schedule of T times.
        steps: How many, at least 1.
        spacing: Which of the above.
    """
    total = schedule.timesteps
    if steps == 1 or steps >= total or spacing == "linear":
        return spaced_times(total, steps)
    if spacing == "trailing":
        return _distinct([total - i * total / steps - 1 for i in range(steps)], total)
    abar = np.array(schedule.signal)
    ends_in_noise = not abar[-1]
    abar = abar[abar > 0]
    noise = np.sqrt((1 - abar) / abar)  # the standard deviation of the noise where alpha = 1
    if spacing == "middle":
        first, last = (-np.log(snr) / 2 for snr in MIDDLE_SNR)
        wanted = _between(first, last, np.arange(steps) / steps)
        return _distinct([total - 1.0, *_place(wanted, np.log(noise))[1:]], total)
    share = np.linspace(0, 1, steps)
    if spacing == "logsnr":
        wanted = _between(np.log(noise[-1]), np.log(noise[0]), share)
    else:
        root = 1 / KARRAS_RHO
        wanted = np.log(_between(noise[-1] ** root, noise[0] ** root, share)) * KARRAS_RHO
    places = _place(wanted, np.log(noise))
    return _distinct([total - 1.0, *places[1:]] if ends_in_noise else places, total)


def _between(start: Any, end: Any, share: Any) -> Any:
    return start + share * (end - start)


def _place(wanted: Any, values: Any) -> list[float]:
    """Where `wanted` stands in the rising `values`, by linear interpolation."""
    above = np.searchsorted(values, wanted).clip(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    places: list[float] = (above - 1 + (wanted - low) / (high - low)).tolist()
    return places


def _distinct(places: Sequence[float], total: int) -> list[int]:
    """The nearest integers, moved where two would fall on one."""
    times: list[int] = []
    for place in reversed(places):
        times.append(max(round(place), times[-1] + 1 if times else 0))
    times.reverse()
    return [min(time, total - 1 - i) for i, time in enumerate(times)]
