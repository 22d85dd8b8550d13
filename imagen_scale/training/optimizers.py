"""The optimizer that DeepSpeed steps."""

import os
import shutil
from collections.abc import Iterable
from typing import Any

import torch

from imagen_scale.config import Config


def has_compiler() -> bool:
    """Whether the C++ compiler that torch would call is there."""
    return shutil.which(os.environ.get("CXX", "c++")) is not None


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: Config, lr: float) -> Any:
    """AdamW: DeepSpeed's CPU kernel for offloaded states, torch's fused one otherwise.

    Without a compiler torch's steps the offloaded states too; it is slower there.
    """
    training = config.training
    options: dict[str, Any] = {
        "lr": lr,
        "betas": training.betas,
        "weight_decay": training.weight_decay,
    }
    offload = config.deepspeed.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and has_compiler():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)
        optimizer.register_step_pre_hook(_forget_step_count())
        return optimizer
    return torch.optim.AdamW(parameters, fused=True, **options)


def _forget_step_count() -> Any:
    """A hook that makes DeepSpeed's CPU Adam a function of its saved state alone.

    The kernel keeps beta^step as a running product, but computes it anew whenever the step is not
    the next one, as after a resume; the two differ in the last bit, and so would the resumed run.
    An update of a scrap tensor at step 0 makes it compute anew at every step (DeepSpeed 0.19,
    csrc/includes/cpu_adam.h, IncrementStep).
    """
    scrap = [torch.zeros(1) for _ in range(4)]

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        group = optimizer.param_groups[0]
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, 0, group["lr"], *group["betas"], group["eps"],
            group["weight_decay"], group["bias_correction"], *scrap,
        )  # fmt: skip

    return hook
