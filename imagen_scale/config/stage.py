"""One stage of a cascade as the configuration means it: every value resolved, typed."""

from dataclasses import dataclass
from typing import Any

from imagen_scale.config.distillation import DistillConfig, FewSteps
from imagen_scale.config.network import TEXT_ENCODER_DIMS, ImagenConfig, UnetConfig, size_divisor
from imagen_scale.config.section import (
    CheckpointingLevel,
    LossWeightName,
    OptimizerName,
    PerLevel,
    PerUnet,
    PredictionType,
    T,
    per_level,
)
from imagen_scale.config.sections import MemoryConfig, TrainingConfig
from imagen_scale.errors import ConfigError


@dataclass(frozen=True)
class Network:
    """One U-Net, ready to be built: an entry of `unets` without its nulls.

    Fields have the names and meanings of the configuration's keys; those that may be written per
    level hold one value for each, finest first.
    """

    dim: int
    dim_mults: tuple[int, ...]
    channels: int
    channels_out: int
    cond_dim: int
    text_embed_dim: int
    num_resnet_blocks: tuple[int, ...]
    layer_attns: tuple[bool, ...]
    layer_cross_attns: tuple[bool, ...]
    attn_heads: int
    lowres_cond: bool
    memory_efficient: bool
    attend_at_middle: bool
    max_text_len: int
    pred_type: PredictionType

    @property
    def num_levels(self) -> int:
        """Number of resolution levels."""
        return len(self.dim_mults)

    @property
    def size_divisor(self) -> int:
        """What the picture's side must be a multiple of."""
        return size_divisor(self.num_levels, memory_efficient=self.memory_efficient)

    @property
    def time_cond_dim(self) -> int:
        """Width of the vector that time and pooled text add up to."""
        return self.dim * 4 * (2 if self.lowres_cond else 1)


@dataclass(frozen=True)
class StageConfig:
    """One U-Net of a run: its place in the cascade, its network, how it is trained.

    Made by `Config.stage`. What the planner chooses where nothing is written is None until then:
    `micro_batch`, `optimizer`, `checkpointing`, `offload_activations`, `optimizer_in_backward`.

    Args:
        number: From 1.
        imagen: The run's section, as are `training`, `memory`, `deepspeed` and `distill`.
        unet: The entry of `unets` as it was written.
        text_encoder: Name of the encoder in force.
        text_embed_dim: Width of its features; None where only loading it would tell.
    """

    number: int
    imagen: ImagenConfig
    unet: UnetConfig
    training: TrainingConfig
    memory: MemoryConfig
    deepspeed: dict[str, Any]
    text_encoder: str
    text_embed_dim: int | None
    distill: DistillConfig | None = None

    @property
    def seed_index(self) -> int:
        """Its number from 0: what seeds are made of, so that old runs continue as they began."""
        return self.number - 1

    @property
    def name(self) -> str:
        """As messages call it: "U-Net 2"."""
        return f"U-Net {self.number}"

    @property
    def is_super_resolution(self) -> bool:
        """Whether a smaller picture comes in."""
        return self.number > 1

    @property
    def size(self) -> int:
        """Side of its pictures in pixels."""
        return self.imagen.image_sizes[self.number - 1]

    @property
    def small_size(self) -> int | None:
        """Side of the pictures that come in; None for the base, which takes none."""
        return self.imagen.image_sizes[self.number - 2] if self.number > 1 else None

    @property
    def threshold(self) -> float | None:
        """Percentile of dynamic thresholding; None: values beyond [-1, 1] are cut off.

        A picture that is corrected lies where it belongs already: to scale one on white paper
        down for the values that a correction takes beyond white would only move its colours.
        """
        if self.unet.lowres_residual:
            return None
        return self.imagen.dynamic_thresholding_percentile

    @property
    def train_size(self) -> int:
        """Side of the pictures that training computes: the crop's where there is one."""
        return self.unet.crop or self.size

    @property
    def timesteps(self) -> int:
        """Diffusion steps T."""
        return self._own(self.imagen.timesteps)

    @property
    def steps(self) -> int:
        """Optimizer steps of its training."""
        return self._own(self.training.steps)

    @property
    def global_batch(self) -> int:
        """Pictures per optimizer step over all ranks."""
        return self._own(self.training.global_batch)

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return self._own(self.training.lr)

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        written = self._own(self.training.warmup_steps)
        return min(1000, self.steps // 10) if written is None else written

    @property
    def ema_snapshot_every(self) -> int:
        """Steps between snapshots of the averages of `training.ema_widths`."""
        return self.training.ema_snapshot_every or max(1, self.steps // 16)

    @property
    def loss_weight(self) -> LossWeightName | None:
        """What each noise level weighs in the loss; None for the plain loss."""
        return self._own(self.training.loss_weight)

    @property
    def start_from(self) -> str | None:
        """Folder of the run whose weights it starts from."""
        return self._own(self.training.start_from)

    @property
    def few_steps(self) -> FewSteps | None:
        """How it is distilled; None for an ordinary stage."""
        if self.distill is None:
            return None
        steps, teacher = self._own(self.distill.steps), self.distill.teacher
        if steps is None:
            return None
        cond_scale = self._own(self.distill.cond_scale)
        teacher_steps = self._own(self.distill.teacher_steps)
        return FewSteps(teacher, steps, cond_scale, teacher_steps, self.distill.spacing)

    @property
    def micro_batch(self) -> int | None:
        """Pictures per rank and forward pass."""
        return self._own(self.training.micro_batch)

    @property
    def optimizer(self) -> OptimizerName | None:
        """Name of the optimizer."""
        return self._own(self.training.optimizer)

    @property
    def checkpointing(self) -> tuple[CheckpointingLevel, ...] | None:
        """What backward recomputes, per resolution level."""
        written: PerUnet[PerLevel[CheckpointingLevel]] | None = self.memory.checkpointing
        if isinstance(written, tuple):
            written = written[self.number - 1]
        return None if written is None else per_level(written, self.unet.num_levels)

    @property
    def offload_activations(self) -> bool | None:
        """Whether host memory keeps what recomputation starts from."""
        return self._own(self.memory.offload_activations)

    @property
    def optimizer_in_backward(self) -> bool | None:
        """Whether each gradient is applied as it appears."""
        return self._own(self.memory.optimizer_in_backward)

    @property
    def zero_optimization(self) -> dict[str, Any] | None:
        """DeepSpeed's section as it was written."""
        return self.deepspeed.get("zero_optimization")

    @property
    def network(self) -> Network:
        """The U-Net with every null filled in.

        Raises:
            ConfigError: If the width of the text features is not known.
        """
        if self.text_embed_dim is None:
            raise ConfigError(
                f"imagen.text_embed_dim: the width of {self.text_encoder!r} is not known without "
                f"loading it; write it there."
            )
        unet, levels = self.unet, self.unet.num_levels
        return Network(
            dim=unet.dim,
            dim_mults=unet.dim_mults,
            channels=unet.channels,
            channels_out=unet.channels_out or unet.channels,
            cond_dim=unet.cond_dim or unet.dim,
            text_embed_dim=self.text_embed_dim,
            num_resnet_blocks=per_level(unet.num_resnet_blocks, levels),
            layer_attns=per_level(unet.layer_attns, levels),
            layer_cross_attns=per_level(unet.layer_cross_attns, levels),
            attn_heads=unet.attn_heads,
            lowres_cond=self.is_super_resolution,
            memory_efficient=unet.memory_efficient,
            attend_at_middle=unet.attend_at_middle,
            max_text_len=unet.max_text_len,
            pred_type=unet.pred_type,
        )

    def _own(self, value: PerUnet[T]) -> T:
        """This stage's value of a key that takes one, or one per U-Net."""
        return value[self.number - 1] if isinstance(value, tuple) else value


def text_width(imagen: ImagenConfig, unets: tuple[UnetConfig, ...], encoder: str) -> int | None:
    """Width of the text features as far as the configuration tells."""
    for width in (imagen.text_embed_dim, *(unet.text_embed_dim for unet in unets)):
        if width is not None:
            return width
    return TEXT_ENCODER_DIMS.get(encoder)
