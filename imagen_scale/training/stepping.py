"""One optimizer step, left out when a gradient is not a number."""

from typing import NamedTuple

import torch
from torch import Tensor

from imagen_scale.training.engine import Engine
from imagen_scale.training.feed import Feed
from imagen_scale.training.objective import Objective


class Stepped(NamedTuple):
    """What a step did on this rank."""

    loss: Tensor  # mean over its samples
    applied: bool  # the same on every rank
    positions: list[int]  # of its samples in the run
    losses: Tensor  # of each of them
    times: Tensor  # likewise
    loss_scale: float | None = None  # of fp16, while it can be lowered; see `Engine`


class Stepper:
    """Accumulates micro-batches and updates the weights, unless the engine finds NaN or infinity.

    Args:
        engine: Holds the weights.
        objective: The loss.
        accumulation: Micro-batches in a step.
    """

    def __init__(self, engine: Engine, objective: Objective, accumulation: int) -> None:
        self.engine, self.objective, self.accumulation = engine, objective, accumulation
        self.is_updating = False  # memory that runs out now leaves half-made weights

    def step(self, micro_batches: Feed, lr: float) -> Stepped:
        """Takes `accumulation` micro-batches; every rank together."""
        self.engine.set_lr(lr)
        loss_scale = self.engine.loss_scale
        all_losses, all_times, positions, applied = [], [], [], True
        for micro_step in range(1, self.accumulation + 1):
            batch = next(micro_batches)
            losses, times = self.objective.timed_losses(self.engine, batch)
            all_losses.append(losses.detach())
            all_times.append(times)
            positions += batch.positions.tolist()
            self.is_updating = self.engine.updates_in_backward
            self.engine.backward(losses.mean())
            micro_batches.prefetch()  # before the engine waits to see how the gradients are
            self.is_updating |= micro_step == self.accumulation
            applied = self.engine.step()
        self.is_updating = False
        flat = torch.cat(all_losses)
        return Stepped(flat.mean(), applied, positions, flat, torch.cat(all_times), loss_scale)
