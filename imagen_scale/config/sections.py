"""The sections of a configuration beside `imagen`, `unets` and `deepspeed`."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from imagen_scale.config.section import (
    MOST,
    CheckpointingLevel,
    LossWeightName,
    NaturalInt,
    OptimizerName,
    PerUnet,
    PositiveFloat,
    PositiveInt,
    Probability,
    Rate,
    Section,
    Share,
    TrainingPrecision,
    parse_bytes,
)

Level = Annotated[int, Field(ge=0, le=255)]


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
    fit: Literal["crop", "pad", "random_crop"] = Field(
        "crop",
        description="What makes a square of a picture. crop: its centre; pad: all of it, with "
        "pad_colour beside it; random_crop: another part of it each time it is trained on, and the "
        "centre where it is held out or shown.",
    )
    pad_colour: tuple[Level, Level, Level] = Field(
        (255, 255, 255), description="Of fit pad: red, green and blue, 0 to 255."
    )
    flip: bool = Field(False, description="Mirror each picture with probability 1/2.")
    val_fraction: Probability = Field(
        0.0, description="Share of pictures held out for the validation loss, chosen by hash."
    )
    val_group: str | None = Field(
        None,
        description="What is held out together or not at all: the pictures of one caption, of one "
        "folder (of one tar), or those whose key has the same first group of this regular "
        "expression, as in ^(.*)_[0-9]+ for views of one thing. null: each picture by itself.",
    )

    @field_validator("val_group")
    @classmethod
    def _is_an_expression(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(
                    f"{value!r} is no regular expression ({error}); write caption, folder or one "
                    f"as in ^(.*)_[0-9]+."
                ) from None
        return value

    num_workers: NaturalInt | None = Field(
        None,
        description="Loader processes per rank, of training and of validation. null: none where "
        "there is no card or the resized pictures are stored (cache_images_gb); else up to 4, as "
        "there are cores beside the ranks.",
    )
    cache_dir: str | None = Field(
        None, description="Prepared pictures and text; null: ~/.cache/imagen-scale."
    )
    cache_images_gb: Annotated[float, Field(ge=0, le=1e9)] = Field(
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

    recipe: Literal["modern"] | None = Field(
        None,
        description="modern: what learned fastest where it was tried, for every key of it that is "
        "not written: x0 prediction, its weight and schedule, learning rates by width, "
        "super-resolution as a correction; see [Recipes](recipes.md). null: MinImagen's way.",
    )
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
        "Imagen paper's for its base; no ZeRO); muon (matrices move by their orthogonalised "
        "momentum, the rest by AdamW: one moment less, no ZeRO). Or one per U-Net. null: adamw, or "
        "what memory.budget needs.",
    )
    lr: PerUnet[Rate] = Field(1e-4, description="Peak rate, or one per U-Net.")
    betas: tuple[Probability, Probability] = Field((0.9, 0.99), description="AdamW's betas.")
    weight_decay: Annotated[float, Field(ge=0, le=MOST)] = Field(
        0.01, description="AdamW's weight decay."
    )
    decay_matrices_only: bool = Field(
        False,
        description="Only weights of linear layers and convolutions decay; biases, scales of "
        "normalisations and what stands for a missing text do not.",
    )
    lr_schedule: Literal["constant", "cosine", "wsd"] = Field(
        "cosine",
        description="What follows the warm-up: constant, the peak rate; cosine, down to zero; wsd, "
        "the peak rate, and in the last fifth of the steps a straight line down to zero.",
    )
    warmup_steps: PerUnet[NaturalInt] | None = Field(
        None,
        description="Steps in which the rate rises from zero to its peak, or one per U-Net. null: "
        "1000, but at most a tenth of the steps.",
    )
    grad_clip: PositiveFloat | None = Field(
        1.0, description="Largest norm of the gradient; null: it is not clipped."
    )
    precision: TrainingPrecision = Field(
        "auto",
        description="What the network computes in; the optimizer keeps fp32. auto: bf16 on cards "
        "that have it (RTX 30xx, A100 and later), fp16 with a dynamic loss scale on older ones, "
        "fp32 without a card.",
    )
    ema_decay: Probability = Field(
        0.9999, description="Decay of the averaged weights that pictures are sampled from."
    )
    ema_widths: Annotated[
        tuple[Annotated[float, Field(ge=0.005, le=0.25)], ...], Field(max_length=8)
    ] = Field(
        (),
        description="Averages kept in host memory beside it, each as long as this share of the "
        "training, e.g. [0.05, 0.1]: `imagen-scale ema` makes the average of any length out of "
        "their snapshots. See [Recipes](recipes.md).",
    )

    @field_validator("ema_widths")
    @classmethod
    def _are_different(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{value:g}" for value in values}) < len(values):  # as their files are named
            raise ValueError(f"{list(values)} has one twice, and each takes memory; write it once.")
        return values

    ema_snapshot_every: PositiveInt | None = Field(
        None, description="Steps between these snapshots. null: a sixteenth of the steps."
    )
    lowres_aug_max: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Super-resolution: the low-resolution picture is noised to a level drawn "
        "from [0, this), as t / T. 1 is MinImagen's range.",
    )
    lowres_degrade: Share = Field(
        0.0,
        description="Super-resolution: share of the samples whose low-resolution picture is shrunk "
        "by another kernel, blurred, packed as JPEG: for those who will upscale pictures from "
        "elsewhere.",
    )
    lowres_samples: Share = Field(
        0.0,
        description="Super-resolution: share of the samples whose low-resolution picture is drawn "
        "by the stage before, from the picture itself under noise: what it gets in a cascade. "
        "Drawn once, when that stage is trained, of at most 4096 pictures of 64 px.",
    )
    loss_weight: PerUnet[LossWeightName | None] = Field(
        None,
        description="What the error of the clean picture counts at each noise level, or one per "
        "U-Net: x0 (1), eps (SNR), v (1 + SNR), v_clipped (at most 10), min_snr (at most 5), "
        "sigmoid; see [Objectives](objectives.md). null: the plain loss of what is predicted.",
    )
    stratified_times: bool = Field(
        False,
        description="Spread the times of each step evenly over its global batch instead of "
        "drawing each by itself.",
    )
    seed: NaturalInt = Field(0, description="Same seed, same run.")
    start_from: PerUnet[str | None] | None = Field(
        None,
        description="Folder of a run whose trained U-Net of the same number is the start in place "
        "of random weights, or one per U-Net; with the same network and text encoder, `pred_type`, "
        "schedule and pictures may be others. See [Few steps](few_steps.md). null: random.",
    )
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
    on_spike: Literal["tell", "stop"] = Field(
        "tell",
        description="What a report does whose loss is above 5 times the median of the last 20, or "
        "whose gradient norm is above 10 times: a warning, or training ends before anything of it "
        "is saved, so that it can go on from the checkpoint before with a lower rate.",
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
    val_x0: bool = Field(
        False,
        description="Validations also measure the error of the predicted clean picture at 12 "
        "noise levels, which compares between objectives as losses do not; they take 13 times as "
        "long.",
    )
    keep_best: Literal["val_loss", "val_x_0_error"] | None = Field(
        None,
        description="Keep the averaged weights of the validation at which this was least; "
        "`imagen-scale ema --best` samples from them. val_x_0_error needs val_x0.",
    )
    sample_every: PositiveInt | None = Field(
        5000, description="Steps between grids of pictures; null: none are drawn in training."
    )
    sample_prompts: tuple[str, ...] = Field(
        (), description="What the base stage draws in these grids; none: captions of the data."
    )
    sample_steps: PositiveInt = Field(50, description="Sampling steps of these grids.")
    sample_cond_scale: PositiveFloat = Field(3.0, description="Their guidance.")
    tf32: bool = Field(
        True,
        description="On a card, what is computed in fp32 takes inputs rounded to 10 bits of "
        "mantissa (bf16 has 7): convolutions, as torch does by itself, and products of matrices "
        "alike. false: both in full fp32, several times slower.",
    )
    cudnn_benchmark: bool = Field(
        False,
        description="On a card, time the ways to compute each convolution and take the fastest. "
        "They take memory that no plan counts, and two runs may choose differently.",
    )
    compile: bool = Field(
        False,
        description="torch.compile the U-Net: fewer, larger kernels; the first step takes "
        "minutes. ZeRO stages 0 to 2, not with memory.optimizer_in_backward or "
        "memory.offload_activations. Plans are those of the uncompiled network.",
    )
    channels_last: bool = Field(
        False,
        description="Lay activations out as cuDNN's 16-bit convolutions read them. Of use on a "
        "card, and beside compile: by themselves group normalisations lay them out anew.",
    )
    deterministic: bool = Field(
        False,
        description="On a card, take only operations that give the same bits each time, slower: "
        "what a continued run needs to be the uninterrupted one bit for bit. On a CPU it is so "
        "anyway.",
    )


class MemoryConfig(Section):
    """What is traded for memory on the card. Nothing here changes what is learned.

    With a budget, whatever is null here, `training.micro_batch`, `training.optimizer` and
    `deepspeed.zero_optimization` are chosen by the planner; what is written is kept.
    """

    budget: str | None = Field(
        "auto",
        description='Memory of each card that training may use, e.g. "12GB"; "auto" is what the '
        "cards have free, and plans nothing where there is none. null: nothing is planned.",
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
    tensorboard: bool = Field(
        False,
        description="Write RUN/unetN/tensorboard, which `tensorboard --logdir runs` shows.",
    )
