"""Processes, the group they form, and DeepSpeed's engine."""

import os
from collections.abc import Callable
from typing import Any

from imagen_scale.config import StageConfig
from imagen_scale.errors import ConfigError
from imagen_scale.planning.machine import can_pin
from imagen_scale.planning.setup import Setup, complete_zero
from imagen_scale.training import operators
from imagen_scale.training.in_backward import InBackwardEngine
from imagen_scale.training.optimizers import make_optimizer, uses_cpu_adam
from imagen_scale.training.ranks import PATIENCE, together


def _start_deepspeed(setup: Setup, say: Callable[[str], None]) -> None:
    """Makes DeepSpeed know the group, after its operators are compiled.

    They are compiled into a folder of each machine's own by its first process; the others wait.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    os.environ["TORCH_EXTENSIONS_DIR"] = str(operators.extensions_dir())
    names = {operators.COMMUNICATION} | ({operators.CPU_ADAM} if uses_cpu_adam(setup) else set())

    def build() -> None:
        if os.environ["LOCAL_RANK"] == "0":
            operators.build_missing(names, say)

    together(build)
    if deepspeed.comm.is_initialized():
        return
    deepspeed.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        auto_mpi_discovery=False,
        timeout=PATIENCE,
        verbose=False,
    )


def engine_config(stage: StageConfig, setup: Setup, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration for one U-Net.

    Args:
        stage: The U-Net; the run's `deepspeed` section is passed through.
        setup: How the U-Net is trained.
        num_parameters: Of the U-Net.
    """
    # Without the check ZeRO-1 and 2 would apply NaN gradients in bf16.
    bf16: dict[str, Any] = {"enabled": setup.precision == "bf16", "check_grad_overflow": True}
    if setup.optimizer == "adamw_bf16":
        bf16 |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return {
        "steps_per_print": 2**31,  # our own telemetry reports
        # The optimizer is ours even when its states are offloaded.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **stage.deepspeed,
        "zero_optimization": complete_zero(setup.zero, num_parameters, pin=can_pin()),
        "train_batch_size": setup.global_batch,
        "train_micro_batch_size_per_gpu": setup.micro_batch,
        "gradient_accumulation_steps": setup.accumulation,
        "gradient_clipping": stage.training.grad_clip or 0.0,
        "bf16": bf16,
    }


def make_engine(
    unet: Any, stage: StageConfig, setup: Setup, say: Callable[[str], None] = print
) -> Any:
    """An engine around one U-Net; what it needs of DeepSpeed is compiled first, and said."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    if setup.in_backward:
        device = torch.device(get_accelerator().current_device_name())
        return InBackwardEngine(unet, stage, setup, device)

    _start_deepspeed(setup, say)
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in unet.parameters())
    try:
        engine, *_ = deepspeed.initialize(
            model=unet,
            optimizer=make_optimizer(unet.parameters(), stage, setup),
            config=engine_config(stage, setup, num_parameters),
            dist_init_required=False,
        )
    except ValueError as error:  # pydantic's ValidationError is one
        raise ConfigError(
            f"deepspeed: DeepSpeed refuses the configuration: {error}\nCorrect that key of the "
            f"deepspeed section; where bf16 is not supported, set training.precision to fp32."
        ) from None
    return engine


def release_engine(engine: Any) -> None:
    """Frees an engine's memory, whoever still refers to it.

    DeepSpeed 0.19's ZeRO-3 leaves its states alive after `destroy`: hooks in the autograd graph
    refer to them, out of the garbage collector's sight.
    """
    import torch

    parameters = list(engine.module.parameters())
    engine.destroy()
    seen: set[int] = set()

    def empty(holder: Any) -> None:
        if id(holder) in seen:
            return
        seen.add(id(holder))
        if isinstance(holder, torch.Tensor):
            empty(getattr(holder, "ds_tensor", None))
            holder.grad = None
            holder.data = holder.data.new_empty(0)
        elif isinstance(holder, dict):
            for value in list(holder.values()):
                empty(value)
        elif isinstance(holder, list | tuple):
            for value in holder:
                empty(value)
        elif isinstance(holder, torch.optim.Optimizer):
            empty(vars(holder))

    empty(parameters)
    if engine.optimizer is not None:
        empty(vars(engine.optimizer))
