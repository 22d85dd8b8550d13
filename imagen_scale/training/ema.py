"""Exponential moving average of the weights, kept where the fp32 master weights are."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from imagen_scale.diffusion import ema_profiles
from imagen_scale.training.engine import Engine
from imagen_scale.training.ferry import Ferry

EXCHANGE_ELEMENTS = 2**20  # 4 MiB at a time


class Ema:
    """Average of each rank's own share of the fp32 master weights.

    Nothing is gathered: under ZeRO each rank averages its shard, on the CPU when the optimizer
    is offloaded. Averaging masters rather than bf16 weights matters: at decay 0.9999 an update
    is below bf16's resolution.

    Args:
        engine: Whose weights.
        decay: Of the average, once it has grown to it.
        offload: Keep the average in host memory wherever the masters are.
    """

    def __init__(self, engine: Engine, decay: float, *, offload: bool = False) -> None:
        self.engine = engine
        self.decay = decay
        self.masters = engine.masters()
        self.shards = [
            master.detach().to("cpu" if offload else master.device, torch.float32, copy=True)
            for master in self.masters
        ]

    def decay_at(self, step: int) -> float:
        """What the average keeps of itself: it grows from 0.1, to forget the random start early."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after optimizer step `step` (1-based)."""
        decay = self.decay_at(step)
        masters = [master.detach() for master in self.masters]
        if all(map(_are_alike, self.shards, masters)):
            torch._foreach_lerp_(self.shards, masters, 1 - decay)
            return
        bring = _as_float32
        if not _are_near(self.shards[0], masters[0]):
            # Made anew: torch keeps what was pinned once.
            bring = Ferry(EXCHANGE_ELEMENTS, masters[0].device).bring
        for shard, master in zip(self.shards, masters, strict=True):
            ours = shard.view(-1)
            for piece, theirs in bring(master.view(-1), _pieces(ours)):
                ours[piece].lerp_(theirs, 1 - decay)

    def shapes(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Type and shape of what `named_weights` yields, in its order."""
        named = {name: (torch.float32, shape) for name, shape in self.engine.shapes().items()}
        buffers = self.engine.module.named_buffers()
        return named | {name: (torch.float32, buffer.shape) for name, buffer in buffers}

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every averaged parameter and buffer, whole, in fp32 on the CPU.

        All ranks must iterate together; parameters are gathered one at a time.
        """
        module = self.engine.module
        place = {p: i for i, group in enumerate(self.engine.groups()) for p in group}
        shown = None
        with ExitStack() as exchanged:
            for name, parameter in module.named_parameters():
                if place[parameter] != shown:
                    shown = place[parameter]
                    exchanged.close()
                    exchanged.enter_context(self._in_place_of_master(shown))
                yield name, self.engine.gather(parameter).detach().float().cpu().clone()
        for name, buffer in module.named_buffers():
            yield name, buffer.detach().float().cpu()

    def release(self) -> None:
        """Lets go of masters and average; the end of it."""
        self.masters.clear()
        self.shards.clear()

    def is_finite(self) -> bool:
        """Whether what this rank's shards hold of parameters is numbers only.

        What ZeRO-3 fills the last rank's share up with is nobody's, and may be anything.
        """
        return all(
            bool(shard.view(-1)[part.offset : part.offset + part.numel].isfinite().all())
            for shard, parts in zip(self.shards, self.engine.fragments(), strict=True)
            for part in parts
        )

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


class PowerEma(Ema):
    """A power function average in host memory; see `diffusion/ema_profiles.py`.

    Args:
        engine: Whose weights.
        width: Relative to the steps done.
    """

    def __init__(self, engine: Engine, width: float) -> None:
        super().__init__(engine, 1.0, offload=True)
        self.width = width

    def decay_at(self, step: int) -> float:
        """0 at the first step: nothing of the random start is kept."""
        return ema_profiles.decay(step, self.width)


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


def _as_float32(flat: Tensor, pieces: Iterator[slice]) -> Iterator[tuple[slice, Tensor]]:
    for piece in pieces:
        yield piece, flat[piece].float()


def _are_near(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device


def _are_alike(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype
