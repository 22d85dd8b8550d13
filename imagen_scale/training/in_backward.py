"""An engine that applies and frees each gradient as it appears in backward.

The gradients of a whole U-Net never exist together, so fp32 training with exact Adam takes 12
bytes a parameter on the card and none on the host. What needs all gradients at once (clipping by
their norm, accumulation) is refused by the configuration.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from imagen_scale.config import Config
from imagen_scale.planning.setup import Setup
from imagen_scale.tensor_file import write_tensors
from imagen_scale.training.optimizers import make_optimizer

_FILE = "state.safetensors"


class InBackwardEngine:
    """The part of DeepSpeed's engine that training uses, for one process without ZeRO.

    Args:
        unet: The network.
        config: The run.
        unet_index: From 0.
        setup: How it is trained.
        device: Where.
    """

    def __init__(
        self, unet: Any, config: Config, unet_index: int, setup: Setup, device: torch.device
    ) -> None:
        self.module, self.device = unet.to(device), device
        self.optimizers = {
            name: make_optimizer([parameter], config, unet_index, setup)
            for name, parameter in self.module.named_parameters()
        }
        self.optimizer = _Groups(self.optimizers)
        self._of_parameter = dict(
            zip(self.module.parameters(), self.optimizers.values(), strict=True)
        )
        for parameter in self.module.parameters():
            parameter.register_post_accumulate_grad_hook(self._apply)

    def _apply(self, parameter: Parameter) -> None:
        self._of_parameter[parameter].step()
        parameter.grad = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Runs the network."""
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Backward and update in one."""
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

    def save_checkpoint(self, folder: str, tag: str, *, save_latest: bool) -> None:
        """Writes weights and moments into `folder/tag`."""
        place = Path(folder) / tag
        place.mkdir(parents=True)
        tensors, plain = self._state()
        write_tensors(
            place / _FILE,
            {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()},
            tensors.items(),
            {"plain": json.dumps(plain)},
        )

    @torch.no_grad()
    def load_checkpoint(self, folder: str, tag: str, *, load_module_strict: bool) -> None:
        """Reads what `save_checkpoint` wrote, one parameter at a time."""
        from safetensors import safe_open

        with safe_open(Path(folder) / tag / _FILE, "pt") as file:
            plain = json.loads(file.metadata()["plain"])
            keys: dict[str, list[str]] = {}
            for key in file.keys():  # noqa: SIM118 - not a dict
                keys.setdefault(key.partition("/")[0], []).append(key)
            for name, parameter in self.module.named_parameters():
                parameter.copy_(file.get_tensor(name))
                optimizer = self.optimizers[name]
                state = {
                    key.partition("/")[2]: file.get_tensor(key) for key in keys[name] if "/" in key
                } | plain[name]
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})

    def destroy(self) -> None:
        """Frees the moments."""
        self.optimizers.clear()
        self._of_parameter.clear()

    def _state(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """Weights and moments by name ("name", "name/moment"), and what is not a tensor."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, dict[str, Any]] = {}
        for name, parameter in self.module.named_parameters():
            tensors[name] = parameter
            plain[name] = {}
            for key, value in self.optimizers[name].state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value
                else:
                    plain[name][key] = value
        return tensors, plain


class _Groups:
    """Every optimizer's groups in one list: where the learning rate is set."""

    def __init__(self, optimizers: dict[str, Any]) -> None:
        self._optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As they are now: loading a state replaces them."""
        return [group for o in self._optimizers.values() for group in o.param_groups]
