"""How well a network knows the clean picture, whatever it was trained to predict."""

from collections.abc import Callable

import torch
from torch import Tensor

from imagen_scale.diffusion.denoiser import Denoiser
from imagen_scale.diffusion.schedule import NoiseSchedule

# From nearly all noise to nearly none, the same for all schedules.
LOG_SNRS = torch.linspace(-9, 9, 12, dtype=torch.float64)


def nearest_times(schedule: NoiseSchedule) -> list[int]:
    """The time of a schedule that is nearest to each of `LOG_SNRS`."""
    log_snr = schedule.snr.log().cpu()
    return [int((log_snr - wanted).abs().argmin()) for wanted in LOG_SNRS]


@torch.no_grad()
def x_0_errors(
    denoise: Denoiser, schedule: NoiseSchedule, x_0: Tensor, draw_noise: Callable[[], Tensor]
) -> Tensor:
    """Mean squared error of the predicted clean picture at each of `LOG_SNRS`, (B, 12).

    Args:
        denoise: Predicts it; what it says is neither thresholded nor clamped.
        schedule: That the network was trained with.
        x_0: Clean pictures (B, C, H, W) in [-1, 1].
        draw_noise: The noise of the next log-SNR, (B, C, H, W).
    """
    errors = []
    for time in nearest_times(schedule):
        t = torch.full((len(x_0),), time, device=x_0.device)
        predicted = denoise(schedule.q_sample(x_0, t, draw_noise()), t)
        errors.append((predicted - x_0).square().flatten(1).mean(1))
    return torch.stack(errors, 1)
