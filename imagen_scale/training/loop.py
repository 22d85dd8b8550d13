"""Learning rates."""

import math

from imagen_scale.config import StageConfig


def learning_rate(stage: StageConfig, step: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then constant or cosine to zero."""
    training, peak, steps = stage.training, stage.lr, stage.steps
    if step < training.warmup_steps:
        return peak * (step + 1) / training.warmup_steps
    if training.lr_schedule == "constant":
        return peak
    done = (step - training.warmup_steps) / (steps - training.warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * done))
