"""An engine that applies and frees each gradient as it appears in backward.

The gradients of a whole U-Net never exist together, so fp32 training with exact Adam takes 12
bytes a parameter on the card and none on the host. What needs all gradients at once (clipping by
their norm, accumulation) is refused by the configuration.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from imagen_scale.config import StageConfig
from imagen_scale.planning.setup import Setup
from imagen_scale.training.optimizers import make_optimizer


class InBackwardEngine:
    """The part of DeepSpeed's engine that training uses, for one process without ZeRO.

    Args:
        unet: The network.
        stage: The U-Net.
        setup: How it is trained.
        device: Where.
    """

    def __init__(self, unet: Any, stage: StageConfig, setup: Setup, device: torch.device) -> None:
        self.module, self.device = unet.to(device), device
        self.optimizers = {
            name: make_optimizer([parameter], stage, setup)
            for name, parameter in self.module.named_parameters()
        }
        self.optimizer = _Groups(self.optimizers)
        self._of_parameter = dict(
            zip(self.module.parameters(), self.optimizers.values(), strict=True)
        )
        for parameter in self.module.parameters():
            parameter.register_post_accumulate_grad_hook(self._apply)

    def _apply(self, parameter: Parameter) -> None:
        assert parameter.grad is not None
        # From the first bad gradient on nothing of this step is applied.
        if not self.optimizer.overflow and bool(parameter.grad.isfinite().all()):
            self._of_parameter[parameter].step()
        else:
            self.optimizer.overflow = True
        parameter.grad = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Runs the network."""
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Backward and update in one; nothing when the loss is not finite."""
        self.optimizer.overflow = not bool(loss.isfinite())
        if not self.optimizer.overflow:
            loss.backward()

    def step(self) -> None:
        """Nothing is left to do after backward."""

    def train(self, mode: bool = True) -> None:
        """As `nn.Module.train`."""
        self.module.train(mode)

    def eval(self) -> None:
        """As `nn.Module.eval`."""
        self.module.eval()

    def zero_optimization_stage(self) -> int:
        """No ZeRO."""
        return 0

    def get_global_grad_norm(self) -> None:
        """The gradients never exist together."""

    def destroy(self) -> None:
        """Frees the moments."""
        self.optimizers.clear()
        self._of_parameter.clear()


class _Groups:
    """Every optimizer's groups in one list: where the learning rate is set."""

    def __init__(self, optimizers: dict[str, Any]) -> None:
        self._optimizers = optimizers
        self.overflow = False  # as ZeRO's optimizers call a step that was left out

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As they are now: loading a state replaces them."""
        return [group for o in self._optimizers.values() for group in o.param_groups]
