"""Pictures drawn anew by a stage from where noise hides a part of them."""

import torch
from torch import Tensor

from imagen_scale.diffusion.spacing import visited_times
from imagen_scale.sampling.options import StageSettings
from imagen_scale.sampling.stage import Inputs, Stage, denoiser_of, noise_source, solved


@torch.no_grad()
def redraw(
    stage: Stage, pictures: Tensor, inputs: Inputs, settings: StageSettings, *, kept: float
) -> Tensor:
    """What a stage makes of pictures that it is shown through noise.

    Their large shapes stay and the stage's own hand comes over the rest, so that each still fits
    the picture it was made from.

    Source: Meng et al. 2022 (SDEdit), arXiv:2108.01073.

    Args:
        stage: With pictures of this size.
        pictures: (B, 3, size, size) in [-1, 1].
        inputs: Captions, seeds, and for super-resolution the pictures made small.
        settings: How to sample.
        kept: Share of the power that is still the picture's where sampling starts, alpha_bar, in
            (0, 1); of the times that are visited, those with less are left out.

    Returns:
        (B, 3, size, size) in [-1, 1] on the CPU.
    """
    schedule, shape = stage.schedule, pictures.shape[1:]
    draw_noise = noise_source("redraw", stage.config, inputs.seeds, shape, stage.device)
    cond = stage.conditioning(inputs, settings.cond_scale, draw_noise)
    visited = visited_times(schedule, settings.steps, settings.spacing)
    times = [t for t in visited if schedule.abar[t] >= kept] or visited[-1:]
    start = torch.full((len(pictures),), times[0], device=stage.device)
    x_t = schedule.q_sample(pictures.to(stage.device), start, draw_noise())
    denoiser = denoiser_of(stage, cond, (shape[-2], shape[-1]))
    return solved(stage, denoiser, x_t, times, settings, draw_noise)
