"""What training asks of an engine, whoever computes: DeepSpeed or this project.

An engine holds the network and updates *masters*: tensors of this rank alone, in fp32 (bf16 with
`adamw_bf16`), from which the weights that the network computes with are made. Without ZeRO every
parameter is its own master; ZeRO joins the rank's share of many parameters in few flat ones.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from imagen_scale.runs.shares import Fragment


class Engine(Protocol):
    """A network in training, as this rank sees it.

    `masters`, `fragments`, `groups` and `optimizer_of` count alike: entry i of each belongs to the
    same master. The lists may be made anew at each call, the tensors in them are the engine's own.

    Attributes:
        module: The network.
        device: Where it computes.
    """

    module: nn.Module
    device: torch.device

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 3. From 1 on each rank holds masters of its own, at 0 all the same."""

    @property
    def updates_in_backward(self) -> bool:
        """Whether `backward` already changes weights; memory that runs out in it spoils them."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Runs the network."""

    def train(self, mode: bool = True) -> None:
        """As `nn.Module.train`."""

    def eval(self) -> None:
        """As `nn.Module.eval`."""

    # Steps: `backward` and `step` for each micro-batch, `set_lr` at any time between.

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of all parameters."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch, divided by the micro-batches of a step.

        Args:
            loss: A scalar that this engine's network made.
        """

    def step(self) -> bool:
        """Ends a micro-batch; the last one of a step updates the weights, on all ranks together.

        Returns:
            False, on every rank, when the update was left out because a gradient was not finite.
        """

    def grad_norm(self) -> float | None:
        """Norm of the last step's gradients before clipping; None where it is not known."""

    # The loss scale of fp16, which grows until a gradient overflows and shrinks then.

    @property
    def loss_scale(self) -> float | None:
        """What the next loss is multiplied by; None where nothing is scaled, or no further down."""

    def loss_scale_state(self) -> dict[str, Any] | None:
        """All that the next scales depend on, for a checkpoint; None where nothing is scaled."""

    def load_loss_scale(self, state: dict[str, Any] | None) -> None:
        """Goes on with a saved scale, if there is one and it is needed."""

    # Weights.

    def masters(self) -> list[Tensor]:
        """This rank's masters."""

    def fragments(self) -> list[list[Fragment]]:
        """What each master is made of, in the order of `Fragment.offset`."""

    def groups(self) -> list[list[Parameter]]:
        """The parameters behind each master, those of which other ranks hold all included."""

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every whole parameter by name, in the module's order."""

    def gather(self, parameter: Parameter) -> Tensor:
        """A whole parameter as the masters have it; all ranks call this together."""

    def optimizer_of(self, index: int) -> torch.optim.Optimizer:
        """The optimizer whose `state` holds the moments of a master."""

    def publish(self) -> None:
        """Makes the network's weights out of changed masters; all ranks call this together."""

    def release(self) -> None:
        """Frees weights, masters and moments, whoever still refers to them; the engine's end."""
