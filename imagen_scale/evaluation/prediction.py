"""How well a network knows the clean picture, whatever it was trained to predict."""

import torch
from torch import Tensor

from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.sampling.stage import Inputs, Stage, noise_source

# From nearly all noise to nearly none, the same for all schedules.
LOG_SNRS = torch.linspace(-9, 9, 12, dtype=torch.float64)


def nearest_times(schedule: NoiseSchedule) -> list[int]:
    """The time of a schedule that is nearest to each of `LOG_SNRS`."""
    log_snr = schedule.snr.log().cpu()
    return [int((log_snr - wanted).abs().argmin()) for wanted in LOG_SNRS]


@torch.no_grad()
def x_0_errors(stage: Stage, real: Tensor, inputs: Inputs) -> Tensor:
    """Mean squared error of the predicted clean picture at each of `LOG_SNRS`, (N, 12).

    Pictures are noised with the same noise for every network, predicted once with their captions
    and without guidance, and neither thresholded nor clamped.

    Args:
        stage: The network.
        real: Pictures (N, 3, size, size) in [-1, 1].
        inputs: Their captions, seeds of the noise, and for super-resolution the pictures shrunk.
    """
    at_once, times, found = stage.batch_size(), nearest_times(stage.schedule), []
    for start in range(0, len(real), at_once):
        x_0 = real[start : start + at_once].to(stage.device)
        part = inputs.part(start, start + at_once)
        draw_noise = noise_source(
            "x_0 error", stage.config, part.seeds, x_0.shape[1:], stage.device
        )
        denoiser = stage.runtime.bind(stage.conditioning(part, 1.0, draw_noise))
        errors = []
        for time in times:
            t = torch.full((len(x_0),), time, device=stage.device)
            predicted = denoiser(stage.schedule.q_sample(x_0, t, draw_noise()), t)
            errors.append((predicted - x_0).square().flatten(1).mean(1))
        found.append(torch.stack(errors, 1).cpu())
    return torch.cat(found)
