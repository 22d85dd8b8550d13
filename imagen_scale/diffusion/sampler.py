"""The sampling loop: from noise to images with a denoiser."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from imagen_scale.diffusion.denoiser import Denoiser
from imagen_scale.diffusion.names import Sampler
from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.diffusion.solvers import Level, Past, ddim_step, dpmpp_2m_step, heun_step


def num_evaluations(sampler: Sampler, steps: int) -> int:
    """How often the denoiser is asked: Heun asks twice a step, but for the last.

    And once in the first step where the schedule begins with noise alone.
    """
    return 2 * steps - 1 if sampler == "heun" else steps


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    x_t: Tensor,
    schedule: NoiseSchedule,
    *,
    times: Sequence[int],
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    threshold: Callable[[Tensor], Tensor],
    draw_noise: Callable[[], Tensor],
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Runs the reverse process.

    The last step goes from the last time to the clean image that was predicted there.

    Args:
        denoiser: Predicts the clean picture.
        x_t: Standard normal start, (B, C, H, W) float32.
        schedule: Noise schedule.
        times: Falling times to visit, from `visited_times`.
        sampler: "ddpm" (ancestral), "ddim", "dpmpp_2m" (DPM-Solver++(2M)), "dpmpp_2m_sde" (its
            form with noise) or "heun" (EDM's; two evaluations a step).
        eta: For "ddim": share of DDPM's noise that is added, in [0, 1].
        threshold: Applied to each predicted clean image, e.g. dynamic thresholding.
        draw_noise: Gives the next standard normal tensor of x_t's shape; called by "ddpm",
            "dpmpp_2m_sde" and, with eta above 0, "ddim".
        on_step: Called with the number of steps done and the predicted clean images.

    Returns:
        Images in [-1, 1], (B, C, H, W).
    """

    def predict(x: Tensor, level: Level) -> Tensor:
        t = torch.full((len(x),), level.time, device=x.device, dtype=torch.int64)
        return threshold(denoiser(x, t))

    levels = levels_at(schedule, times)
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
    return x_0.clamp(-1, 1)


def levels_at(schedule: NoiseSchedule, times: Sequence[int]) -> list[Level]:
    """The noise levels of some times, to double precision."""
    abar = schedule.abar[torch.tensor(times, device=schedule.abar.device)]
    rows = zip(times, abar.sqrt().tolist(), (1 - abar).sqrt().tolist(), strict=True)
    return [Level(*row) for row in rows]
