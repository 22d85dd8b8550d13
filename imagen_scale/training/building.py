"""From a stage and a setup to the network and the engine around it."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from imagen_scale.config import StageConfig
from imagen_scale.data.seeds import seeded
from imagen_scale.errors import ConfigError
from imagen_scale.models.layers import apply_channels_last
from imagen_scale.models.memory import apply_checkpointing, in_host_memory
from imagen_scale.models.unet import UNet
from imagen_scale.planning.setup import Setup
from imagen_scale.training.engine import Engine
from imagen_scale.training.in_backward import InBackwardEngine
from imagen_scale.training.zero_engine import make_zero_engine


def build_unet(stage: StageConfig, setup: Setup) -> nn.Module:
    """The network with its initial weights, the same on every rank and at every start."""
    torch.manual_seed(seeded("init", stage.training.seed, stage.seed_index))
    hold = in_host_memory if setup.offload_activations else nullcontext
    unet = apply_checkpointing(UNet(stage.network), setup.checkpointing, hold=hold).train()
    if stage.unet.lowres_residual:
        unet.begin_with_zero()
    if stage.training.channels_last:
        apply_channels_last(unet)
    if stage.training.compile:
        _check_compilable(setup)
        torch.compiler.reset()  # frees other U-Nets' graphs, of which it keeps a few and no more
        unet.compile(dynamic=False)  # in place: its parameters keep their names
    return unet


def _check_compilable(setup: Setup) -> None:
    """Refuses what the planner chose, or what is taken without a budget, beside `compile`.

    Raises:
        ConfigError: With what to write instead; what is written is refused by the configuration.
    """
    if setup.zero_stage == 3 or setup.in_backward or setup.offload_activations:
        raise ConfigError(
            "training.compile: the setup chosen here takes ZeRO-3, the optimizer in backward or "
            "offloaded activations, which act between the layers that a compiled network joins; "
            'set deepspeed.zero_optimization to {"stage": 2} (with offload_optimizer where memory '
            "is short), memory.optimizer_in_backward and memory.offload_activations to false, or "
            "training.compile to false."
        )


def make_engine(
    unet: nn.Module, stage: StageConfig, setup: Setup, say: Callable[[str], None] = print
) -> Engine:
    """The engine that a setup asks for.

    Args:
        unet: On the CPU.
        stage: The U-Net's configuration.
        setup: How it is trained.
        say: Told when something of DeepSpeed has to be compiled first.

    Raises:
        ConfigError: If DeepSpeed refuses the configuration.
        EnvironmentProblem: If something of it cannot be compiled.
    """
    if not setup.in_backward:
        return make_zero_engine(unet, stage, setup, say)
    from deepspeed.accelerator import get_accelerator

    device = torch.device(get_accelerator().current_device_name())
    return InBackwardEngine(unet, stage, setup, device)
