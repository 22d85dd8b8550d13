"""Learning rates."""

import math

from imagen_scale.config import Config


def learning_rate(config: Config, unet_index: int, step: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then constant or cosine to zero."""
    training = config.training
    peak = config.per_unet("training", "lr", unet_index)
    steps = config.per_unet("training", "steps", unet_index)
    if step < training.warmup_steps:
        return peak * (step + 1) / training.warmup_steps
    if training.lr_schedule == "constant":
        return peak
    done = (step - training.warmup_steps) / (steps - training.warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * done))
