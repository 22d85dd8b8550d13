"""Sampling loops: from noise to images with a denoiser."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from imagen_scale.diffusion.denoiser import Denoiser
from imagen_scale.diffusion.schedule import NoiseSchedule


def spaced_times(timesteps: int, steps: int) -> list[int]:
    """`steps` times from T - 1 down to 0, evenly spaced; all of them when steps >= T.

    Both ends are included, so that sampling starts from the noise the network was trained on.
    """
    if steps >= timesteps:
        return list(range(timesteps - 1, -1, -1))
    if steps == 1:
        return [timesteps - 1]
    return [round((timesteps - 1) * (1 - i / (steps - 1))) for i in range(steps)]


def ddim_step(
    x_t: Tensor, x_0: Tensor, abar_t: Tensor, abar_s: Tensor, *, eta: float, noise: Tensor | None
) -> Tensor:
    """Goes from time t to an earlier time s.

    With eta = 1 this is the DDPM posterior of the pair (t, s), with eta = 0 it is deterministic.

    Args:
        x_t: Noisy images, (B, C, H, W).
        x_0: Predicted clean images, (B, C, H, W).
        abar_t: Cumulative alpha at t, scalar.
        abar_s: Cumulative alpha at s, scalar; 1 at the end.
        eta: Share of the posterior's noise that is added, in [0, 1].
        noise: Standard normal, (B, C, H, W); unused when eta = 0.

    Source: Song et al. 2021 (DDIM), arXiv:2010.02502, equations 12 and 16.
    """
    eps = (x_t - abar_t.sqrt() * x_0) / (1 - abar_t).sqrt()
    variance = eta**2 * (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
    # Rounding may push the difference below zero where eta = 1 and s is the last step.
    direction = (1 - abar_s - variance).clamp(min=0).sqrt()
    x_s = abar_s.sqrt() * x_0 + direction * eps
    return x_s if eta == 0 or noise is None else x_s + variance.sqrt() * noise


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    x_t: Tensor,
    schedule: NoiseSchedule,
    *,
    times: Sequence[int],
    eta: float,
    threshold: Callable[[Tensor], Tensor],
    draw_noise: Callable[[], Tensor],
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Runs the reverse process.

    Args:
        denoiser: Predicts the noise.
        x_t: Standard normal start, (B, C, H, W) float32.
        schedule: Noise schedule, on the same device.
        times: Decreasing times to visit, from `spaced_times`.
        eta: 1 for DDPM, 0 for DDIM.
        threshold: Applied to each predicted clean image, e.g. dynamic thresholding.
        draw_noise: Gives the next standard normal tensor of x_t's shape; called if eta > 0.
        on_step: Called with the number of steps done and the predicted clean images.

    Returns:
        Images in [-1, 1], (B, C, H, W).
    """
    abar = schedule.abar
    for i, time in enumerate(times):
        t = torch.full((len(x_t),), time, device=x_t.device, dtype=torch.int64)
        x_0 = threshold(schedule.eps_to_x0(x_t, t, denoiser(x_t, t)))
        is_last = i == len(times) - 1
        abar_s = abar.new_ones(()) if is_last else abar[times[i + 1]]
        noise = draw_noise() if eta > 0 and not is_last else None
        x_t = ddim_step(x_t, x_0, abar[time], abar_s, eta=eta, noise=noise).to(x_0.dtype)
        if on_step is not None:
            on_step(i + 1, x_0)
    return x_t.clamp(-1, 1)
