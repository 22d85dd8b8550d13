"""The configuration of one run: a strict JSON file, checked before torch is imported.

`imagen` and `unets[i]` take MinImagen's own key names, so its JSON blocks load unchanged. Every
section refuses unknown keys; `deepspeed` is passed through to DeepSpeed except for the keys that
this file states once elsewhere (batch sizes, precision, clipping, optimizer).
"""

from typing import Annotated, Any

from pydantic import Field

from imagen_scale.config.distillation import DistillConfig
from imagen_scale.config.network import ImagenConfig, UnetConfig
from imagen_scale.config.section import (
    Section,
)
from imagen_scale.config.sections import (
    DataConfig,
    LoggingConfig,
    MemoryConfig,
    TextConfig,
    TrainingConfig,
)
from imagen_scale.config.stage import StageConfig, text_width
from imagen_scale.errors import UsageError, option


class Config(Section):
    """One run."""

    imagen: ImagenConfig = Field(description="The cascade.")
    unets: Annotated[tuple[UnetConfig, ...], Field(min_length=1)] = Field(
        description="One U-Net for each of `imagen.image_sizes`, the base first."
    )
    data: DataConfig = Field(DataConfig(), description="Where pictures and captions come from.")
    text: TextConfig = Field(TextConfig(), description="How captions become vectors.")
    training: TrainingConfig = Field(TrainingConfig(), description="How each U-Net is trained.")
    distill: DistillConfig | None = Field(None, description="Stages that learn to take few steps.")
    memory: MemoryConfig = Field(MemoryConfig(), description="What is traded for memory.")
    logging: LoggingConfig = Field(LoggingConfig(), description="Files and reports of a run.")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="Passed to DeepSpeed, e.g. zero_optimization."
    )

    @property
    def text_encoder(self) -> str:
        """The encoder in force: `text.encoder`, else MinImagen's `imagen.text_encoder_name`."""
        return self.text.encoder or self.imagen.text_encoder_name

    def stage(self, number: int, text_embed_dim: int | None = None) -> StageConfig:
        """One U-Net with every value resolved.

        Args:
            number: From 1.
            text_embed_dim: Width of the encoder's features; None takes the one written or known.
        """
        width = text_embed_dim or text_width(self.imagen, self.unets, self.text_encoder)
        return StageConfig(
            number, self.imagen, self.unets[number - 1], self.training, self.memory,
            self.deepspeed, self.text_encoder, width, self.distill,
        )  # fmt: skip

    def stages(self, text_embed_dim: int | None = None) -> list[StageConfig]:
        """Every U-Net, in order; see `stage`."""
        return [self.stage(number, text_embed_dim) for number in range(1, len(self.unets) + 1)]

    def check_number(self, number: int, name: str) -> int:
        """A U-Net's number as it is, if there is such a one.

        Args:
            number: From 1.
            name: Of the option it comes from.

        Raises:
            UsageError: If there is none.
        """
        if not 1 <= number <= len(self.unets):
            raise UsageError(
                f"{option(name)} {number}: this cascade has U-Nets 1 to {len(self.unets)}."
            )
        return number
