"""The sampling loop: from noise to images with a denoiser."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from imagen_scale.diffusion.denoiser import Denoiser
from imagen_scale.diffusion.names import Sampler
from imagen_scale.diffusion.reverse import reverse
from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.diffusion.solvers import Level


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
    denoiser_at: Callable[[int], Denoiser] | None = None,
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
        denoiser_at: Gives another denoiser for each time, in place of `denoiser`.

    Returns:
        Images in [-1, 1], (B, C, H, W).
    """

    def predict(x: Tensor, level: Level) -> Tensor:
        t = torch.full((len(x),), level.time, device=x.device, dtype=torch.int64)
        asked = denoiser if denoiser_at is None else denoiser_at(level.time)
        return threshold(asked(x, t))

    x_0 = reverse(
        predict,
        x_t,
        levels_at(schedule, times),
        sampler=sampler,
        eta=eta,
        draw_noise=draw_noise,
        on_step=on_step,
    )
    return x_0.clamp(-1, 1)


def levels_at(schedule: NoiseSchedule, times: Sequence[int]) -> list[Level]:
    """The noise levels of some times, to double precision."""
    abar = schedule.abar[torch.tensor(times, device=schedule.abar.device)]
    rows = zip(times, abar.sqrt().tolist(), (1 - abar).sqrt().tolist(), strict=True)
    return [Level(*row) for row in rows]
