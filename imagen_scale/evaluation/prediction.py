"""The error of the clean picture that a trained stage predicts."""

import torch
from torch import Tensor

from imagen_scale.diffusion import prediction_error
from imagen_scale.sampling.stage import Inputs, Stage, noise_source


@torch.no_grad()
def x_0_errors(stage: Stage, real: Tensor, inputs: Inputs) -> Tensor:
    """Mean squared error of the predicted clean picture at each of `LOG_SNRS`, (N, 12).

    Pictures are noised with the same noise for every network and predicted once, with their
    captions and without guidance.

    Args:
        stage: The network.
        real: Pictures (N, 3, size, size) in [-1, 1].
        inputs: Their captions, seeds of the noise, and for super-resolution the pictures shrunk.
    """
    at_once, found = stage.batch_size(), []
    for start in range(0, len(real), at_once):
        x_0 = real[start : start + at_once].to(stage.device)
        part = inputs.part(start, start + at_once)
        draw_noise = noise_source(
            "x_0 error", stage.config, part.seeds, x_0.shape[1:], stage.device
        )
        denoiser = stage.runtime.bind(stage.conditioning(part, 1.0, draw_noise))
        errors = prediction_error.x_0_errors(denoiser, stage.schedule, x_0, draw_noise)
        found.append(errors.cpu())
    return torch.cat(found)
