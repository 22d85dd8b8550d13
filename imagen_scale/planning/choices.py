"""The ways to train a U-Net that a planner may choose from: what is written stays as it is."""

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from imagen_scale.config import StageConfig
from imagen_scale.config.deepspeed import is_offloaded
from imagen_scale.config.section import CheckpointingLevel, OptimizerName
from imagen_scale.errors import ConfigError
from imagen_scale.planning.machine import Machine
from imagen_scale.planning.setup import (
    OFFLOAD,
    WHOLE_MATRICES,
    Setup,
    accumulation,
    check_ranks,
    precision_of,
)

MAX_MICRO_BATCH = 256


class Mode(NamedTuple):
    """The part of a setup that decides where weights, gradients and moments live."""

    zero: dict[str, Any]
    optimizer: OptimizerName
    in_backward: bool
    ema_offload: bool


def mode_of(setup: Setup) -> Mode:
    """The mode of a setup."""
    return Mode(setup.zero, setup.optimizer, setup.in_backward, setup.ema_offload)


class Choices:
    """What one U-Net may be trained with on one machine.

    Args:
        stage: The U-Net.
        machine: What there is to spend.

    Raises:
        ConfigError: If what is written does not go with so many processes.
    """

    def __init__(self, stage: StageConfig, machine: Machine) -> None:
        check_ranks(stage, machine.ranks)
        self.stage, self.machine = stage, machine
        self.levels = stage.unet.num_levels
        self.precision = precision_of(stage, machine.auto_precision)

    def modes(self) -> Iterator[Mode]:
        """Where weights, gradients and moments may live."""
        for optimizer in self._optimizers:
            for in_backward in self._in_backwards(optimizer):
                for zero in self._zeros(optimizer, in_backward):
                    if self.stage.training.compile and (in_backward or zero.get("stage") == 3):
                        continue  # what acts between layers; see config/rules.py
                    on_host = is_offloaded(zero, "offload_optimizer")
                    written = self.stage.memory.ema_offload
                    for ema in (False,) if on_host else (False, True):
                        if on_host or written in (None, ema):
                            yield Mode(zero, optimizer, in_backward, ema)

    @property
    def _optimizers(self) -> tuple[OptimizerName, ...]:
        written = self.stage.optimizer
        if written is not None:
            return (written,)
        is_bf16 = self.precision == "bf16"
        return ("adamw", "adamw_8bit", "adamw_bf16") if is_bf16 else ("adamw", "adamw_8bit")

    def _in_backwards(self, optimizer: OptimizerName) -> tuple[bool, ...]:
        written = self.stage.optimizer_in_backward
        if written is not None:
            return (written,)
        training = self.stage.training
        micro_batch = self.stage.micro_batch
        is_possible = (
            self.machine.ranks == 1
            and self.precision == "fp32"
            and training.grad_clip is None
            and micro_batch in (None, self.stage.global_batch)
            and not (self.stage.zero_optimization or {}).get("stage")
            and optimizer != "adamw_bf16"
        )
        return (False, True) if is_possible else (False,)

    def _zeros(self, optimizer: OptimizerName, in_backward: bool) -> list[dict[str, Any]]:
        written = self.stage.zero_optimization
        if written is not None:
            return [written]
        if in_backward or optimizer in WHOLE_MATRICES:
            return [{"stage": 0}]
        # On one card stage 3 shares nothing out, but keeps the sums of gradients on the host.
        offloads: list[dict[str, Any]] = [
            {"stage": 2, "offload_optimizer": OFFLOAD},
            {"stage": 3, "offload_optimizer": OFFLOAD},
            {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
        ]
        if optimizer == "adamw_bf16":
            return offloads
        plain: list[dict[str, Any]] = [{"stage": 1}]
        if self.machine.ranks > 1:
            plain += [{"stage": 2}, {"stage": 3}]
        if self.precision == "fp32":
            plain.insert(0, {"stage": 0})
        if self.machine.card is None:
            return plain[:1]  # host memory is all there is: nothing to offload from
        return plain + offloads

    def checkpointings(self) -> list[tuple[tuple[CheckpointingLevel, ...], bool]]:
        """Levels of checkpointing, from the fastest to the smallest."""
        levels: list[tuple[CheckpointingLevel, ...]]
        if self.stage.checkpointing is not None:
            levels = [self.stage.checkpointing]
        else:
            none, norms, blocks = get_args(CheckpointingLevel)
            # Blocks where the pictures are largest hold the most; more mixtures gain little.
            levels = [(none,) * self.levels] + [
                (blocks,) * finest + (norms,) * (self.levels - finest)
                for finest in sorted({0, 1, self.levels})
            ]
        offload = False if self.stage.training.compile else self.stage.offload_activations
        if offload is not None:
            return [(level, offload) for level in levels]
        return [*((level, False) for level in levels), (levels[-1], True)]

    def micro_batches(self, mode: Mode) -> list[int]:
        """Pictures per rank and forward pass.

        Raises:
            ConfigError: If the batch sizes do not fit the number of processes.
        """
        ranks = self.machine.ranks
        written = self.stage.micro_batch
        if self.stage.global_batch % ranks:
            raise ConfigError(
                f"training.global_batch: {self.stage.global_batch} is not a multiple of the "
                f"{ranks} processes; change it."
            )
        share = self.stage.global_batch // ranks
        if mode.in_backward:
            return [share]
        if written is not None:
            accumulation(self.stage, written, ranks)  # refused here
            return [written]
        return [b for b in range(1, min(share, MAX_MICRO_BATCH) + 1) if share % b == 0]
