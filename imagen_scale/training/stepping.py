"""One optimizer step, left out when a gradient is not a number."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imagen_scale.data.sequence import Batch
from imagen_scale.training.objective import Objective


class Stepped(NamedTuple):
    """What a step did on this rank."""

    loss: Tensor  # mean over its samples
    applied: bool  # the same on every rank
    positions: list[int]  # of its samples in the run
    losses: Tensor  # of each of them


class Stepper:
    """Accumulates micro-batches and updates the weights, unless the gradient is NaN or infinite.

    ZeRO's optimizers look at the norm of all gradients over all ranks and leave the step out;
    without ZeRO the gradients, already averaged over the ranks, are looked at here. A single NaN
    would spread to every weight and moment through the clipping by the norm.

    Args:
        engine: DeepSpeed's, or one like it.
        objective: The loss.
        accumulation: Micro-batches in a step.
    """

    def __init__(self, engine: Any, objective: Objective, accumulation: int) -> None:
        self.engine, self.objective, self.accumulation = engine, objective, accumulation
        self.is_updating = False  # memory that runs out now leaves half-made weights

    def step(self, micro_batches: Iterator[Batch], lr: float) -> Stepped:
        """Takes `accumulation` micro-batches; every rank together."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        updates_inside = hasattr(self.engine, "optimizers")
        all_losses, positions, applied = [], [], True
        for micro_step in range(1, self.accumulation + 1):
            batch = next(micro_batches)
            losses = self.objective.losses(self.engine, batch)
            all_losses.append(losses.detach())
            positions += batch.positions.tolist()
            self.is_updating = updates_inside
            self.engine.backward(losses.mean())
            self.is_updating |= micro_step == self.accumulation
            if micro_step == self.accumulation and not self._has_finite_gradients():
                applied = False
                self.engine.zero_grad()
                self.engine.micro_steps += 1  # where DeepSpeed counts to the accumulation's end
            else:
                self.engine.step()
        self.is_updating = False
        flat = torch.cat(all_losses)
        applied &= not getattr(self.engine.optimizer, "overflow", False)
        return Stepped(flat.mean(), applied, positions, flat)

    def _has_finite_gradients(self) -> bool:
        """Whether all gradients are, without ZeRO; with it that is DeepSpeed's work."""
        if self.engine.zero_optimization_stage() > 0:
            return True
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        if not gradients:  # applied and freed in backward
            return True
        return bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())
