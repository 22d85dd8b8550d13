"""The reverse process over arrays of any library: torch's and numpy's take the same steps.

Imports are relative here and beside: imagen-scale-runtime carries the same files.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from .names import Array, Sampler
from .solvers import Level, Past, ddim_step, dpmpp_2m_step, heun_step


def num_evaluations(sampler: Sampler, steps: int) -> int:
    """How often the denoiser is asked: Heun asks twice a step, but for the last.

    And once in the first step where the schedule begins with noise alone.
    """
    return len(evaluated_times(sampler, range(steps)))


def evaluated_times(sampler: Sampler, times: Sequence[int]) -> list[int]:
    """The times at which the denoiser is asked, as often as it is; see `num_evaluations`.

    Args:
        sampler: The solver.
        times: That are visited.
    """
    return [*times, *times[1:]] if sampler == "heun" else [*times]


def reverse(
    predict: Callable[[Array, Level], Array],
    x_t: Array,
    levels: Sequence[Level],
    *,
    sampler: Sampler,
    eta: float,
    draw_noise: Callable[[], Array],
    on_step: Callable[[int, Array], None] | None = None,
) -> Array:
    """Runs the reverse process; the arguments that are not here are `sampler.sample`'s.

    Args:
        predict: Gives the clean pictures expected at a level, thresholded.
        x_t: Standard normal start, (B, C, H, W) float32.
        levels: Falling levels to visit.
        sampler: Name of the solver.
        eta: Of "ddim".
        draw_noise: Gives the next standard normal pictures.
        on_step: Told of each step.

    Returns:
        The clean pictures of the last level, (B, C, H, W); not clamped.
    """
    past: Past | None = None
    for done, (level, lower) in enumerate(pairwise(levels), start=1):
        x_0 = predict(x_t, level)
        match sampler:
            case "ddpm":
                x_t = ddim_step(x_t, x_0, level, lower, eta=1.0, noise=draw_noise())
            case "ddim":
                noise = draw_noise() if eta > 0 else None
                x_t = ddim_step(x_t, x_0, level, lower, eta=eta, noise=noise)
            case "dpmpp_2m":
                x_t = dpmpp_2m_step(x_t, x_0, level, lower, past=past, noise=None)
            case "dpmpp_2m_sde":
                x_t = dpmpp_2m_step(x_t, x_0, level, lower, past=past, noise=draw_noise())
            case "heun":
                x_t = heun_step(x_t, x_0, level, lower, predict=predict)
        past = Past(level, x_0)
        if on_step is not None:
            on_step(done, x_0)
    x_0 = predict(x_t, levels[-1])
    if on_step is not None:
        on_step(len(levels), x_0)
    return x_0
