"""The optimizer that a stage and a setup ask for."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter

from imagen_scale.config import StageConfig
from imagen_scale.errors import MissingExtraError
from imagen_scale.planning.cost import GROUP_ELEMENTS
from imagen_scale.planning.setup import Setup
from imagen_scale.training.matrix_optimizers import MatrixAdafactor, Muon
from imagen_scale.training.operators import has_compiler
from imagen_scale.training.ranks import world_size

# The layers that touch pixels, whose matrices are not Muon's.
_OUTER = ("init_conv.", "final_conv.")


def make_optimizer(
    named: Iterable[tuple[str, Parameter]], stage: StageConfig, setup: Setup
) -> torch.optim.Optimizer:
    """The optimizer of one U-Net, where `uses_cpu_adam` does not ask for DeepSpeed's.

    Without a compiler torch's AdamW steps the offloaded states too, slower.

    Args:
        named: Its parameters with their names.
        stage: The U-Net.
        setup: How it is trained.

    Raises:
        MissingExtraError: If bitsandbytes is needed and not installed.
    """
    named, options = list(named), adamw_options(stage)
    if setup.optimizer == "muon":
        hidden: list[Parameter] = []
        others: list[tuple[str, Parameter]] = []
        for name, parameter in named:
            if is_matrix(name, parameter) and not name.startswith(_OUTER):
                hidden.append(parameter)
            else:
                others.append((name, parameter))
        # Inside backward each matrix is stepped by itself, whenever its gradient is there.
        ranks = 1 if setup.in_backward else world_size()
        return Muon(hidden, parameter_groups(others, stage), options, ranks)
    groups = parameter_groups(named, stage)
    if setup.optimizer == "adafactor":
        return MatrixAdafactor(groups, lr=stage.lr, weight_decay=stage.training.weight_decay)
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


def is_matrix(name: str, parameter: Parameter) -> bool:
    """Whether it is the weight of a linear layer or of a convolution.

    Not so are biases, scales of normalisations, and what stands for a text that is not there.
    """
    return parameter.ndim > 1 and name.endswith("weight")


def parameter_groups(
    named: Iterable[tuple[str, Parameter]], stage: StageConfig
) -> list[dict[str, Any]]:
    """Parameters in groups of bounded size, those without weight decay in groups of their own."""
    named = list(named)
    if not stage.training.decay_matrices_only:
        return bounded_groups(parameter for _, parameter in named)
    matrices = [parameter for name, parameter in named if is_matrix(name, parameter)]
    others = [parameter for name, parameter in named if not is_matrix(name, parameter)]
    undecayed = bounded_groups(others)
    for group in undecayed:
        group["weight_decay"] = 0.0
    return bounded_groups(matrices) + undecayed


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
