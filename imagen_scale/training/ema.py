"""Exponential moving average of the weights, kept where the fp32 master weights are."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

EXCHANGE_ELEMENTS = 2**20  # 4 MiB at a time


class Ema:
    """Average of each rank's own share of the fp32 master weights.

    Nothing is gathered: under ZeRO each rank averages its shard, on the CPU when the optimizer
    is offloaded. Averaging masters rather than bf16 weights matters: at decay 0.9999 an update
    is below bf16's resolution.

    Args:
        engine: DeepSpeed's, or one like it.
        decay: Of the average, once it has grown to it.
        offload: Keep the average in host memory wherever the masters are.
    """

    def __init__(self, engine: Any, decay: float, *, offload: bool = False) -> None:
        self.engine = engine
        self.decay = decay
        self.masters = master_shards(engine)
        self.shards = [
            master.detach().to("cpu" if offload else master.device, torch.float32, copy=True)
            for master in self.masters
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after optimizer step `step` (1-based).

        The decay grows from 0.1 so that the random start is forgotten early.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        masters = [master.detach() for master in self.masters]
        if all(map(_are_alike, self.shards, masters)):
            torch._foreach_lerp_(self.shards, masters, 1 - decay)
            return
        for shard, master in zip(self.shards, masters, strict=True):
            ours, theirs = shard.view(-1), master.view(-1)
            for piece in _pieces(ours):  # brought over a little at a time
                ours[piece].lerp_(theirs[piece].to(ours), 1 - decay)

    def shapes(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Type and shape of what `named_weights` yields, in its order."""
        module = self.engine.module
        named = {
            name: (torch.float32, getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in module.named_parameters()
        }
        return named | {name: (torch.float32, b.shape) for name, b in module.named_buffers()}

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every averaged parameter and buffer, whole, in fp32 on the CPU.

        All ranks must iterate together; parameters are gathered one at a time.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        module = self.engine.module
        has_zero = self.engine.zero_optimization_stage() > 0
        place = {p: i for i, group in enumerate(parameter_groups(self.engine)) for p in group}
        shown = None
        with ExitStack() as exchanged:
            for name, parameter in module.named_parameters():
                if place[parameter] != shown:
                    shown = place[parameter]
                    exchanged.close()
                    exchanged.enter_context(self._in_place_of_master(shown))
                full = safe_get_full_fp32_param(parameter) if has_zero else parameter
                yield name, full.detach().float().cpu().clone()
        for name, buffer in module.named_buffers():
            yield name, buffer.detach().float().cpu()

    def is_finite(self) -> bool:
        """Whether this rank's shards hold numbers only."""
        return all(bool(shard.isfinite().all()) for shard in self.shards)

    @contextmanager
    def _in_place_of_master(self, index: int) -> Iterator[None]:
        master, shard = self.masters[index], self.shards[index]
        with torch.no_grad():
            if is_exact := master.dtype == shard.dtype:
                _exchange(master, shard)
            else:  # bf16 masters cannot carry the average back: this one is put aside
                aside = master.detach().clone()
                master.copy_(shard)
        try:
            yield
        finally:
            with torch.no_grad():
                if is_exact:
                    _exchange(master, shard)
                else:
                    master.copy_(aside)


def _exchange(master: Tensor, shard: Tensor) -> None:
    """Swaps two tensors piece by piece: no second copy of either is made."""
    ours, theirs = master.data.view(-1), shard.view(-1)
    for piece in _pieces(ours):
        moved = ours[piece].clone()
        ours[piece] = theirs[piece]
        theirs[piece] = moved


def _pieces(flat: Tensor) -> Iterator[slice]:
    for start in range(0, flat.numel(), EXCHANGE_ELEMENTS):
        yield slice(start, start + EXCHANGE_ELEMENTS)


def _are_alike(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype


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


def parameter_groups(engine: Any) -> list[list[Parameter]]:
    """The parameters behind each of `master_shards`."""
    optimizer = engine.optimizer
    for name in ("fp16_groups", "bit16_groups"):  # ZeRO-3, ZeRO-1/2; whatever their type
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return [[parameter] for group in optimizer.param_groups for parameter in group["params"]]
