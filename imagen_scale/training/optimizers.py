"""The optimizers of torch and bitsandbytes, and one of our own."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Parameter

from imagen_scale.config import StageConfig
from imagen_scale.errors import MissingExtraError
from imagen_scale.planning.cost import GROUP_ELEMENTS
from imagen_scale.planning.setup import Setup


def has_compiler() -> bool:
    """Whether the C++ compiler that torch would call is there."""
    return shutil.which(os.environ.get("CXX", "c++")) is not None


def make_optimizer(
    parameters: Iterable[Parameter], stage: StageConfig, setup: Setup
) -> torch.optim.Optimizer:
    """The optimizer of one U-Net, where `uses_cpu_adam` does not ask for DeepSpeed's.

    Without a compiler torch's AdamW steps the offloaded states too, slower.

    Raises:
        MissingExtraError: If bitsandbytes is needed and not installed.
    """
    if setup.optimizer == "adafactor":
        return MatrixAdafactor(parameters, lr=stage.lr, weight_decay=stage.training.weight_decay)
    groups, options = bounded_groups(parameters), adamw_options(stage)
    if setup.optimizer == "adamw_8bit":
        return _adamw_8bit(groups, options)
    return torch.optim.AdamW(groups, fused=True, **options)


def uses_cpu_adam(setup: Setup) -> bool:
    """Whether DeepSpeed's compiled AdamW steps states in host memory."""
    exact, coarse = setup.optimizer == "adamw", setup.optimizer == "adamw_bf16"
    return setup.offloads_optimizer and (coarse or (exact and has_compiler()))


def adamw_options(stage: StageConfig) -> dict[str, Any]:
    """What every AdamW is told, whoever wrote it."""
    training = stage.training
    return {"lr": stage.lr, "betas": training.betas, "weight_decay": training.weight_decay}


def bounded_groups(parameters: Iterable[Parameter]) -> list[dict[str, Any]]:
    """Parameters in order, in groups of bounded size.

    Without offload ZeRO makes an fp32 copy of one group's gradients at a time.
    """
    groups: list[dict[str, Any]] = []
    elements = GROUP_ELEMENTS
    for parameter in parameters:
        if elements >= GROUP_ELEMENTS:
            groups.append({"params": []})
            elements = 0
        groups[-1]["params"].append(parameter)
        elements += parameter.numel()
    return groups


def _adamw_8bit(groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW with moments of one byte each, quantised in blocks.

    Source: Dettmers et al. 2022, arXiv:2110.02861.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise MissingExtraError(
            f"training.optimizer adamw_8bit needs bitsandbytes ({error}). Install it with "
            f"`pip install 'imagen-scale[8bit]'`, or set training.optimizer to adamw."
        ) from None
    return AdamW8bit(groups, **options)


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
