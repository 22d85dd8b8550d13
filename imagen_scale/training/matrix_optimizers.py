"""Optimizers that see a weight as a matrix: torch's, for convolutions too."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Parameter

from imagen_scale.training.ranks import come_to_exchange, rank


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of hidden layers, AdamW for everything else.

    A matrix moves by its momentum with all singular values made about 1, scaled to the size of
    AdamW's steps, so that a learning rate means the same for both. A convolution's weight is the
    matrix (out, in * k * k).

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the scale: Liu et al.
    2025, arXiv:2502.16982.

    Args:
        matrices: Weights of linear layers and convolutions; may be empty.
        others: Groups of all other parameters; may be empty.
        options: What AdamW is told; rate and weight decay hold for Muon too.
        ranks: Processes that hold the same weights and gradients and share the work, each a part
            of the matrices; all then have the same again, bit for bit. One does all of it.
    """

    def __init__(
        self, matrices: list[Parameter], others: list[dict[str, Any]], options: dict[str, Any],
        ranks: int = 1,
    ) -> None:  # fmt: skip
        self._matrices = matrices
        self._shares = divided([(len(p), p.numel() // len(p)) for p in matrices], ranks)
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            with _as_matrices(matrices):
                self._parts.append(torch.optim.Muon(
                    matrices, lr=options["lr"], weight_decay=options["weight_decay"],
                    adjust_lr_fn="match_rms_adamw",
                ))  # fmt: skip
        if others:
            self._parts.append(torch.optim.AdamW(others, fused=True, **options))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        for part in self._parts:
            part.state = self.state  # one of both

    def step(self, closure: Any = None) -> Any:
        """One step; see `torch.optim.Muon`."""
        with _as_matrices(self._matrices):
            for part in self._parts:
                if len(self._shares) > 1 and isinstance(part, torch.optim.Muon):
                    self._step_together(part)
                else:
                    part.step()

    def _step_together(self, muon: torch.optim.Muon) -> None:
        """Steps this rank's matrices, then takes those of the others from them."""
        (group,) = muon.param_groups
        for parameter in self._matrices:
            if parameter.grad is not None and not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        group["params"] = [self._matrices[i] for i in self._shares[rank()]]
        muon.step()
        group["params"] = self._matrices
        come_to_exchange()
        for owner, share in enumerate(self._shares):
            moved = [self._matrices[i] for i in share if self._matrices[i].grad is not None]
            tensors = [parameter.data for parameter in moved]
            tensors += [self.state[parameter]["momentum_buffer"] for parameter in moved]
            if not tensors:
                continue
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            torch.distributed.broadcast(flat, owner)
            if owner != rank():
                parts = flat.split([tensor.numel() for tensor in tensors])
                for tensor, part in zip(tensors, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))


def divided(shapes: list[tuple[int, int]], ranks: int) -> list[list[int]]:
    """Which matrices each rank orthogonalises, by index: about equal work, the largest first."""
    work = [rows * columns * min(rows, columns) for rows, columns in shapes]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in sorted(range(len(shapes)), key=lambda i: -work[i]):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += work[i]
    return shares


class MatrixAdafactor(torch.optim.Adafactor):
    """Adafactor that factors a convolution's weight as a matrix (out, in * k * k).

    torch factors the last two dimensions, which for a 3x3 kernel saves a third instead of nearly
    all. The learning rate is relative to each weight's own size.

    Source: Shazeer & Stern 2018, arXiv:1804.04235; the Imagen paper trains its base with it.
    """

    def step(self, closure: Any = None) -> Any:
        """One step; see `torch.optim.Adafactor`."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        with _as_matrices(parameters):
            return super().step(closure)


@contextmanager
def _as_matrices(parameters: list[Parameter]) -> Iterator[None]:
    shapes = [parameter.shape for parameter in parameters]
    for parameter in parameters:
        if parameter.ndim > 2:
            _reshape(parameter, torch.Size((len(parameter), -1)))
    try:
        yield
    finally:
        for parameter, shape in zip(parameters, shapes, strict=True):
            _reshape(parameter, shape)


def _reshape(parameter: Parameter, shape: torch.Size) -> None:
    gradient, parameter.grad = parameter.grad, None
    parameter.data = parameter.data.reshape(shape)
    parameter.grad = None if gradient is None else gradient.reshape(shape)
