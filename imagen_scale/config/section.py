"""What the sections of a configuration are made of."""

import re
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
NaturalInt = Annotated[int, Field(ge=0, lt=2**63)]
MOST_CHANNELS = MOST_PIXELS = 2**16  # of a layer, of a side: far above what any memory holds
Channels = Annotated[int, Field(gt=0, le=MOST_CHANNELS)]
Pixels = Annotated[int, Field(gt=0, le=MOST_PIXELS)]
PositiveFloat = Annotated[float, Field(gt=0)]
MOST = 1e6  # of a rate: far above any that trains, and a float32 holds its products
Rate = Annotated[float, Field(gt=0, le=MOST)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
PerLevel: TypeAlias = T | tuple[T, ...]  # one value, or one per resolution level of the U-Net
PerUnet: TypeAlias = T | tuple[T, ...]  # one value, or one per U-Net of the cascade

CheckpointingLevel: TypeAlias = Literal["none", "norms", "blocks"]
# What the network computes in; "auto" takes what the card at hand is made for.
TrainingPrecision: TypeAlias = Literal["auto", "bf16", "fp16", "fp32"]
# What a network predicts, and what the error of the clean picture counts at each noise level.
PredictionType: TypeAlias = Literal["eps", "v", "x0"]
LossWeightName: TypeAlias = Literal["x0", "eps", "v", "v_clipped", "min_snr", "sigmoid"]
OptimizerName: TypeAlias = Literal["adamw", "adamw_8bit", "adamw_bf16", "adafactor", "muon"]


class Section(BaseModel):
    """A section of the file: no unknown keys, no type coercion, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def per_level(value: PerLevel[T], num_levels: int) -> tuple[T, ...]:
    """Repeats a single value for each level; a tuple is returned as it is."""
    return value if isinstance(value, tuple) else (value,) * num_levels


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "12GB", "11.5 GiB" or "900MB"; GB is 10^9, GiB 2^30.

    Raises:
        ValueError: If it is not a positive number and one of these units.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kMGT]i?B)\s*", text)
    size = 0
    if match is not None:
        unit = match[2]
        power = "kMGT".index(unit[0]) + 1
        size = int(float(match[1]) * (1024 if "i" in unit else 1000) ** power)
    if size == 0:
        raise ValueError(f"{text[:40]!r} is not a size: write a number and MB, GB, MiB or GiB")
    return size
