"""Exponential moving average of the weights, kept where the fp32 master weights are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

EXCHANGE_ELEMENTS = 2**22  # 16 MiB at a time


class Ema:
    """Average of each rank's own share of the fp32 master weights.

    Nothing is gathered: under ZeRO each rank averages its shard, on the CPU when the optimizer
    is offloaded. Averaging masters rather than bf16 weights matters: at decay 0.9999 an update
    is below bf16's resolution.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine = engine
        self.decay = decay
        self.masters = master_shards(engine)
        self.shards = [master.detach().clone() for master in self.masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after optimizer step `step` (1-based).

        The decay grows from 0.1 so that the random start is forgotten early.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shards, [master.detach() for master in self.masters], 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's shards, for its own file in a checkpoint."""
        return {str(i): shard for i, shard in enumerate(self.shards)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores this rank's shards."""
        for i, shard in enumerate(self.shards):
            shard.copy_(state[str(i)])

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every averaged parameter and buffer, whole, in fp32 on the CPU.

        All ranks must iterate together; parameters are gathered one at a time.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        module = self.engine.module
        has_zero = self.engine.zero_optimization_stage() > 0
        with self._in_place_of_masters():
            for name, parameter in module.named_parameters():
                full = safe_get_full_fp32_param(parameter) if has_zero else parameter
                yield name, full.detach().float().cpu().clone()
        for name, buffer in module.named_buffers():
            yield name, buffer.detach().float().cpu()

    def is_finite(self) -> bool:
        """Whether this rank's shards hold numbers only."""
        return all(bool(shard.isfinite().all()) for shard in self.shards)

    @contextmanager
    def _in_place_of_masters(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swaps masters and average, piece by piece: no second copy of either is made."""
        for master, shard in zip(self.masters, self.shards, strict=True):
            ours, theirs = master.data.view(-1), shard.view(-1)
            for start in range(0, ours.numel(), EXCHANGE_ELEMENTS):
                piece = slice(start, start + EXCHANGE_ELEMENTS)
                kept = ours[piece].clone()
                ours[piece] = theirs[piece]
                theirs[piece] = kept


def master_shards(engine: Any) -> list[Tensor]:
    """This rank's fp32 master weights as DeepSpeed 0.19 keeps them.

    ZeRO-3 and ZeRO-1/2 hold flat tensors under different names; without ZeRO (fp32 only) the
    parameters are their own masters.
    """
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
