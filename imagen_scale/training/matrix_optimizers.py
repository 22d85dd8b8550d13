"""Optimizers that see a weight as a matrix: torch's, for convolutions too."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Parameter


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
    """

    def __init__(
        self, matrices: list[Parameter], others: list[dict[str, Any]], options: dict[str, Any]
    ) -> None:
        self._matrices = matrices
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
                part.step()


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
