"""An engine that applies and frees each gradient as it appears in backward.

The gradients of a whole U-Net never exist together, so fp32 training with exact Adam takes 12
bytes a parameter on the card and none on the host. What needs all gradients at once (clipping by
their norm, accumulation) is refused by the configuration.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from imagen_scale.config import StageConfig
from imagen_scale.planning.setup import Setup
from imagen_scale.runs.shares import Fragment
from imagen_scale.training.optimizers import make_optimizer


class InBackwardEngine:
    """An `Engine` for one process, without ZeRO and without DeepSpeed.

    Args:
        unet: The network.
        stage: The U-Net.
        setup: How it is trained.
        device: Where.
    """

    zero_stage = 0
    updates_in_backward = True

    def __init__(
        self, unet: nn.Module, stage: StageConfig, setup: Setup, device: torch.device
    ) -> None:
        self.module, self.device = unet.to(device), device
        self._optimizers: dict[Parameter, torch.optim.Optimizer] = {
            parameter: make_optimizer([(name, parameter)], stage, setup)
            for name, parameter in self.module.named_parameters()
        }
        self._takes_flag = all(map(_takes_flag, self._optimizers.values()))
        self._bad = torch.zeros((), device=device)  # 1 from a step's first bad gradient on
        for parameter in self._optimizers:
            parameter.register_post_accumulate_grad_hook(self._apply)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Runs the network."""
        return self.module(*inputs)

    def train(self, mode: bool = True) -> None:
        """As `nn.Module.train`."""
        self.module.train(mode)

    def eval(self) -> None:
        """As `nn.Module.eval`."""
        self.module.eval()

    def set_lr(self, lr: float) -> None:
        """Tells every parameter's optimizer."""
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

    def backward(self, loss: Tensor) -> None:
        """Backward and update in one; nothing is updated when the loss is not finite.

        A gradient that is not finite though the loss is ends the updates of this step there.
        """
        self._bad.copy_(~loss.detach().isfinite())
        loss.backward()

    def step(self) -> bool:
        """Tells how `backward` went, for which it waits; nothing is left to do."""
        return not self._bad.item()

    def grad_norm(self) -> None:
        """None: the gradients never exist together."""

    loss_scale = None

    def loss_scale_state(self) -> None:
        """None: fp32 needs no scale."""

    def load_loss_scale(self, state: dict[str, Any] | None) -> None:
        """Does nothing."""

    def masters(self) -> list[Tensor]:
        """The parameters: each is its own master."""
        return list(self._optimizers)

    def fragments(self) -> list[list[Fragment]]:
        """One whole parameter each."""
        return [[Fragment(name, 0, p.numel(), 0)] for name, p in self.module.named_parameters()]

    def groups(self) -> list[list[Parameter]]:
        """One parameter each."""
        return [[parameter] for parameter in self._optimizers]

    def shapes(self) -> dict[str, torch.Size]:
        """By name, in the module's order."""
        return {name: parameter.shape for name, parameter in self.module.named_parameters()}

    def gather(self, parameter: Parameter) -> Tensor:
        """The parameter itself, which is whole."""
        return parameter

    def optimizer_of(self, index: int) -> torch.optim.Optimizer:
        """Each parameter has its own."""
        return list(self._optimizers.values())[index]

    def publish(self) -> None:
        """Does nothing: the network computes with the masters."""

    def release(self) -> None:
        """Frees weights and moments."""
        for parameter in self._optimizers:
            parameter.grad = None
            parameter.data = parameter.data.new_empty(0)
        self._optimizers.clear()

    def _apply(self, parameter: Parameter) -> None:
        assert parameter.grad is not None
        optimizer: Any = self._optimizers[parameter]
        # From the first bad gradient on nothing of this step is applied.
        self._bad.logical_or_(~parameter.grad.isfinite().all())
        if self._takes_flag:
            optimizer.found_inf = self._bad
            optimizer.step()
        elif not self._bad.item():
            optimizer.step()
        parameter.grad = None


def _takes_flag(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step can be left out on the device, without the host waiting to know.

    torch's fused optimizers do so for its GradScaler; the others here do not.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
