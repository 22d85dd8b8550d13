"""The learning rate of each step."""

import math

from imagen_scale.config import StageConfig

DECAY = 0.2  # share of the steps in which "wsd" comes down


def learning_rate(stage: StageConfig, step: int) -> float:
    """Rate of optimizer step `step` (from 0): a linear warm-up, then what `lr_schedule` says.

    `wsd` (warm-up, stable, decay) stays at the peak and comes down in a straight line over the last
    fifth of the steps, so that a training can be made longer from any checkpoint before (Hu et al.
    2024, arXiv:2404.06395).
    """
    warmup, steps = stage.warmup_steps, stage.steps
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    match stage.training.lr_schedule:
        case "cosine":
            return stage.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        case "wsd":
            begin = max(warmup, steps - max(1, round(DECAY * steps)))
            return stage.lr * min(1.0, (steps - step) / (steps - begin))
        case "constant":
            return stage.lr
