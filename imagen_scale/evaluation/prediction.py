"""How well a network knows the clean picture, whatever it was trained to predict."""

import torch
from torch import Tensor

from imagen_scale.data.seeds import seeded
from imagen_scale.diffusion.schedule import NoiseSchedule
from imagen_scale.sampling.stage import PIXELS_AT_ONCE, Inputs, Stage

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
    size, found = real.shape[-1], []
    at_once = min(stage.runtime.max_batch or len(real), max(1, PIXELS_AT_ONCE // size**2))
    for start in range(0, len(real), at_once):
        x_0 = real[start : start + at_once].to(stage.device)
        part = inputs.part(start, start + at_once)
        generators = [
            torch.Generator().manual_seed(seeded("x_0 error", stage.config.number, seed))
            for seed in part.seeds
        ]

        def draw_noise(like: Tensor = x_0, own: list[torch.Generator] = generators) -> Tensor:
            noise = [torch.randn(like.shape[1:], generator=generator) for generator in own]
            return torch.stack(noise).to(like.device)

        denoiser = stage.runtime.bind(stage.conditioning(part, 1.0, draw_noise))
        errors = []
        for time in nearest_times(stage.schedule):
            t = torch.full((len(x_0),), time, device=stage.device)
            predicted = denoiser(stage.schedule.q_sample(x_0, t, draw_noise()), t)
            errors.append((predicted - x_0).square().flatten(1).mean(1))
        found.append(torch.stack(errors, 1).cpu())
    return torch.cat(found)
