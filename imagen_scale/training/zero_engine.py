"""DeepSpeed's engine as an `Engine`, and all that is known here of DeepSpeed's inside.

Names of DeepSpeed that it does not document are those of 0.19; they stand in this file only, so
that another version is another version of this file.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from imagen_scale.config import StageConfig
from imagen_scale.errors import ConfigError
from imagen_scale.files.pinning import can_pin
from imagen_scale.planning.setup import Setup, complete_zero
from imagen_scale.runs.shares import Fragment
from imagen_scale.training import operators
from imagen_scale.training.optimizers import (
    adamw_options,
    make_optimizer,
    parameter_groups,
    uses_cpu_adam,
)
from imagen_scale.training.ranks import PATIENCE, local_rank, together


def make_zero_engine(
    unet: nn.Module, stage: StageConfig, setup: Setup, say: Callable[[str], None]
) -> "ZeroEngine":
    """DeepSpeed's engine around one U-Net.

    Args:
        unet: On the CPU.
        stage: The U-Net's configuration.
        setup: How it is trained.
        say: Told when something of DeepSpeed has to be compiled first.

    Raises:
        ConfigError: If DeepSpeed refuses the configuration.
        EnvironmentProblem: If something of it cannot be compiled.
    """
    import deepspeed

    _start_deepspeed(setup, say)
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    make = _cpu_adam if uses_cpu_adam(setup) else make_optimizer
    try:
        engine, *_ = deepspeed.initialize(
            model=unet,
            optimizer=make(unet.named_parameters(), stage, setup),
            config=engine_config(stage, setup, num_parameters),
            dist_init_required=False,
        )
    except ValueError as error:  # pydantic's ValidationError is one
        raise ConfigError(
            f"deepspeed: DeepSpeed refuses the configuration: {error}\nCorrect that key of the "
            f"deepspeed section; where bf16 is not supported, set training.precision to auto."
        ) from None
    return ZeroEngine(engine, setup.accumulation)


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
    sums: dict[str, Any] = {"grad_accum_dtype": "fp32"} if setup.sums_in_fp32 else {}
    return {
        "steps_per_print": 2**31,  # our own telemetry reports
        # The optimizer is ours even when its states are offloaded.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **stage.deepspeed,
        "zero_optimization": complete_zero(
            setup, num_parameters, pin=can_pin(), on_card=torch.cuda.is_available()
        ),
        "train_batch_size": setup.global_batch,
        "train_micro_batch_size_per_gpu": setup.micro_batch,
        "gradient_accumulation_steps": setup.accumulation,
        "gradient_clipping": stage.training.grad_clip or 0.0,
        "bf16": bf16,
        # 0: dynamic; it is halved by a gradient that overflows, doubled after 1000 without.
        "fp16": {"enabled": setup.precision == "fp16", "loss_scale": 0},
        "data_types": sums,
    }


# What DeepSpeed's dynamic scale of fp16 consists of (runtime/fp16/loss_scaler.py).
_SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ZeroEngine:
    """An `Engine` of any number of ranks at any ZeRO stage, 0 included.

    ZeRO's optimizers look at the norm of all gradients over all ranks and leave a step out when it
    is not finite. Without ZeRO the gradients, already averaged over the ranks, are looked at here:
    a single NaN would spread to every weight and moment through the clipping by the norm.

    Args:
        engine: DeepSpeed's.
        accumulation: Micro-batches in a step.
    """

    updates_in_backward = False

    def __init__(self, engine: Any, accumulation: int) -> None:
        self._engine, self._accumulation = engine, accumulation
        self._zero: Any = engine.optimizer  # ZeRO's, around the one that holds the moments
        self.zero_stage: int = engine.zero_optimization_stage()
        self._scaler: Any = self._zero.loss_scaler if engine.fp16_enabled() else None
        if self._scaler is not None:  # at the smallest scale a step is left out like any other
            self._scaler.raise_error_at_min_scale = False
        self.module: nn.Module = engine.module
        self.device: torch.device = engine.device
        if hasattr(self._zero, "update_offload_overflow_tracker"):
            # One wait for the card per parameter in backward, and for nothing: the norm, which
            # is computed from the same gradients, tells of every one that is not finite.
            self._zero.update_offload_overflow_tracker = _look_away

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Runs the network."""
        return self._engine(*inputs)

    def train(self, mode: bool = True) -> None:
        """As `nn.Module.train`."""
        self._engine.train(mode)

    def eval(self) -> None:
        """As `nn.Module.eval`."""
        self._engine.eval()

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of all groups."""
        for group in self._zero.param_groups:
            group["lr"] = lr

    def backward(self, loss: Tensor) -> None:
        """Accumulates, and reduces over the ranks when ZeRO does."""
        self._engine.backward(loss)

    def step(self) -> bool:
        """Ends a micro-batch; updates after the last one, unless a gradient is not finite."""
        engine = self._engine
        is_last = (engine.micro_steps + 1) % self._accumulation == 0
        if is_last and self.zero_stage == 0 and not self._has_finite_gradients():
            engine.zero_grad()
            engine.micro_steps += 1  # where DeepSpeed counts to the accumulation's end
            return False
        engine.step()
        if not (is_last and getattr(self._zero, "overflow", False)):
            return True
        if self.zero_stage == 2:
            # With offload DeepSpeed 0.19 keeps the fp32 sums of a step that it left out, NaN and
            # all, and adds the next ones to them.
            self._zero.averaged_gradients.clear()
        return False

    def grad_norm(self) -> float | None:
        """Norm before clipping, over all ranks; None where DeepSpeed does not tell it."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def loss_scale(self) -> float | None:
        """Of fp16 while it can still be lowered; None otherwise."""
        if self._scaler is None or self._scaler.cur_scale <= self._scaler.min_scale:
            return None
        return float(self._scaler.cur_scale)

    def loss_scale_state(self) -> dict[str, Any] | None:
        """Of DeepSpeed's scaler."""
        if self._scaler is None:
            return None
        return {name: getattr(self._scaler, name) for name in _SCALE_STATE}

    def load_loss_scale(self, state: dict[str, Any] | None) -> None:
        """Makes DeepSpeed's scaler go on."""
        if self._scaler is not None and state is not None:
            vars(self._scaler).update({name: state[name] for name in _SCALE_STATE})

    def masters(self) -> list[Tensor]:
        """The parameters themselves without ZeRO, else flat tensors."""
        if self.zero_stage == 0:
            return list(self._parameters())
        if self.zero_stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def fragments(self) -> list[list[Fragment]]:
        """What each master is made of, as ZeRO divides it among the ranks."""
        named = dict(self.module.named_parameters())
        if self.zero_stage == 0:
            names = {parameter: name for name, parameter in named.items()}
            return [[Fragment(names[p], 0, p.numel(), 0)] for p in self._parameters()]
        by_group: list[list[Fragment]] = [[] for _ in self.groups()]
        place = self._place_in_zero_3 if self.zero_stage == 3 else self._place_in_zero_1_or_2
        for name, parameter in named.items():
            if (placed := place(name, parameter)) is not None:  # a part of it is this rank's
                group, fragment = placed
                by_group[group].append(fragment)
        return [sorted(group, key=lambda fragment: fragment.offset) for group in by_group]

    def groups(self) -> list[list[Parameter]]:
        """One parameter each without ZeRO, else what `parameter_groups` made."""
        if self.zero_stage == 0:
            return [[parameter] for parameter in self._parameters()]
        # ZeRO's names for them, whatever their type.
        return list(self._zero.fp16_groups if self.zero_stage == 3 else self._zero.bit16_groups)

    def shapes(self) -> dict[str, torch.Size]:
        """Of the whole parameters: ZeRO-3 leaves empty ones in the module."""
        return {
            name: getattr(parameter, "ds_shape", parameter.shape)
            for name, parameter in self.module.named_parameters()
        }

    def gather(self, parameter: Parameter) -> Tensor:
        """A whole parameter as the masters have it; all ranks call this together."""
        if self.zero_stage == 0:
            return parameter
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)

    def optimizer_of(self, index: int) -> torch.optim.Optimizer:
        """The one optimizer, which ZeRO wraps."""
        return self._zero if self.zero_stage == 0 else self._zero.optimizer

    def publish(self) -> None:
        """Makes the network's weights out of changed masters; all ranks call this together."""
        if self.zero_stage == 3:
            self._zero.checkpoint_event_prologue()
            for i in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(i)
            self._zero.checkpoint_event_epilogue()
        elif self.zero_stage > 0:
            self._zero.update_lp_params()

    def release(self) -> None:
        """Frees the memory, whoever still refers to it.

        ZeRO-3 leaves its states alive after `destroy`: hooks in the autograd graph refer to them,
        out of the garbage collector's sight.
        """
        parameters = list(self.module.parameters())
        self._engine.destroy()
        _empty([parameters, vars(self._zero)])

    def _parameters(self) -> Iterable[Parameter]:
        """Every parameter in the optimizer's order."""
        return (p for group in self._zero.param_groups for p in group["params"])

    def _has_finite_gradients(self) -> bool:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())

    def _place_in_zero_3(self, name: str, parameter: Any) -> tuple[int, Fragment] | None:
        """The group of this rank's part of a parameter, and the part."""
        # Every rank has a part of the same size; the last one's is padded.
        group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start = torch.distributed.get_rank() * size
        numel = min(size, parameter.ds_numel - start)
        return (group, Fragment(name, start, numel, offset)) if numel > 0 else None

    @staticmethod
    def _place_in_zero_1_or_2(name: str, parameter: Any) -> tuple[int, Fragment] | None:
        """The group of this rank's part of a parameter, and the part."""
        if (mapping := parameter._hp_mapping) is None:
            return None
        ours, theirs = mapping.hp_fragment_address, mapping.lp_fragment_address
        return mapping.param_group_index, Fragment(name, theirs.start, ours.numel, ours.start)


def _start_deepspeed(setup: Setup, say: Callable[[str], None]) -> None:
    """Makes DeepSpeed know the group, after its operators are compiled.

    They are compiled into a folder of each machine's own by its first process; the others wait.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    os.environ["TORCH_EXTENSIONS_DIR"] = str(operators.extensions_dir())
    names = {operators.COMMUNICATION} | ({operators.CPU_ADAM} if uses_cpu_adam(setup) else set())

    def build() -> None:
        if local_rank() == 0:
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


def _cpu_adam(
    named: Iterable[tuple[str, Parameter]], stage: StageConfig, setup: Setup
) -> torch.optim.Optimizer:
    """DeepSpeed's compiled AdamW for states in host memory."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer = DeepSpeedCPUAdam(
        parameter_groups(named, stage), adamw_mode=True,
        fp32_optimizer_states=setup.optimizer == "adamw", **adamw_options(stage),
    )  # fmt: skip
    optimizer.register_step_pre_hook(_forget_step_count())
    return optimizer


def _look_away(gradient: Tensor | None) -> None:
    """Takes the place of a check that another one makes again."""


def _forget_step_count() -> Callable[..., None]:
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


def _empty(root: Any) -> None:
    """Empties every tensor that containers and optimizers below `root` hold."""
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

    empty(root)
