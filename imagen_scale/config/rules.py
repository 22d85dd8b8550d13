"""Rules that join several keys of a configuration."""

import json
from itertools import pairwise
from typing import Any

from imagen_scale.config.deepspeed import deepspeed_problems, is_offloaded
from imagen_scale.config.distill_rules import distill_checks
from imagen_scale.config.network import NORM_GROUPS, TEXT_ENCODER_DIMS, UnetConfig
from imagen_scale.config.schema import Config
from imagen_scale.config.stage import StageConfig


def cross_checks(config: Config) -> list[str]:
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
            value = getattr(getattr(config, section), key, None)  # of a section that may be null
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
        if unet.lowres_residual and (i == 0 or unet.pred_type != "x0"):
            problems.append(
                f"unets.{i}.lowres_residual: what is missing from the enlarged picture is a "
                f"prediction of x_0, from U-Net 2 on; "
                + (f"set unets.{i}.pred_type to x0." if i else "leave it out.")
            )
        if unet.schedule and unet.schedule.zero_terminal_snr and unet.pred_type == "eps":
            problems.append(
                f"unets.{i}.schedule.zero_terminal_snr: where x_t is noise alone, the noise says "
                f"nothing about the picture; set unets.{i}.pred_type to v or x0, or this to false."
            )

    if not problems:
        problems += distill_checks(config)
        for stage in config.stages():
            if stage.global_batch % (stage.micro_batch or stage.global_batch):
                problems.append(
                    f"training.global_batch: {stage.global_batch} is not a multiple of "
                    f"micro_batch {stage.micro_batch} ({stage.name}); change one of them."
                )
            if stage.warmup_steps >= stage.steps:
                problems.append(
                    f"training.warmup_steps: {stage.warmup_steps} is not below the "
                    f"{stage.steps} steps of {stage.name}; lower it."
                )
    weight = training.loss_weight
    if imagen.loss_type != "l2" and any(weight if isinstance(weight, tuple) else [weight]):
        problems.append(
            f"training.loss_weight: {json.dumps(weight)} weighs squared errors, of which alone it "
            f"is known how those of x_0, v and the noise belong together; set imagen.loss_type to "
            f"l2, not {imagen.loss_type}, or this to null."
        )
    if num_unets > 1 and imagen.lowres_sample_noise_level > training.lowres_aug_max:
        problems.append(
            f"imagen.lowres_sample_noise_level: {imagen.lowres_sample_noise_level} is above "
            f"training.lowres_aug_max {training.lowres_aug_max}, so the network never saw it; "
            f"lower it."
        )
    problems += _best_checks(config)
    problems += _lowres_checks(config)
    if config.data.source != "emoji" and not config.data.path:
        problems.append(
            f"data.path: required for source {config.data.source!r}; give the folder or the "
            f"data set's name."
        )
    if config.data.source != "emoji" and config.data.names is not None:
        problems.append("data.names: only the source 'emoji' takes it; remove it.")
    problems += _deepspeed_checks(config)
    if not problems:
        for stage in config.stages():
            problems += _memory_checks(stage)
    return problems


def _lowres_checks(config: "Config") -> list[str]:
    degrade, samples = config.training.lowres_degrade, config.training.lowres_samples
    if (degrade or samples) and len(config.unets) == 1:
        key = "lowres_degrade" if degrade else "lowres_samples"
        return [f"training.{key}: is of super-resolution, and there is one U-Net; remove it."]
    if samples and config.data.fit == "random_crop":
        return [
            "training.lowres_samples: draws each picture once, and data.fit random_crop shows "
            "another part of it each time; choose one of them."
        ]
    if degrade + samples > 1:
        return [
            f"training.lowres_degrade {degrade:g} and training.lowres_samples {samples:g} are "
            f"shares of the same samples; together they may be 1."
        ]
    return []


def _best_checks(config: "Config") -> list[str]:
    best = config.training.keep_best
    if best is not None and config.data.val_fraction == 0:
        return [
            f"training.keep_best: {best} is measured on pictures that are held out; set "
            f"data.val_fraction above 0, e.g. 0.05, or leave it out."
        ]
    if best == "val_x_0_error" and not config.training.val_x0:
        return ["training.keep_best: val_x_0_error needs training.val_x0; set it to true."]
    if best == "val_x_0_error" and config.distill is not None:
        return [
            "training.keep_best: val_x_0_error is that of a stage of many steps, and this one "
            "learns few; write val_loss."
        ]
    return []


_PER_UNET_KEYS = {
    "imagen": ("timesteps",),
    "training": (
        "steps",
        "global_batch",
        "micro_batch",
        "optimizer",
        "lr",
        "warmup_steps",
        "loss_weight",
        "start_from",
    ),
    "distill": ("steps", "cond_scale", "teacher_steps"),
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
    if unet.dim_mults[0] != 1 and not unet.memory_efficient:
        problems.append(
            f"{where}.dim_mults: the finest level works in dim channels, so the first is 1, not "
            f"{unet.dim_mults[0]}; multiply {where}.dim instead, or set {where}.memory_efficient."
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


def _memory_checks(stage: StageConfig) -> list[str]:
    """Rules of what is traded for memory, for one U-Net."""
    problems = []
    levels, checkpointing = stage.unet.num_levels, stage.checkpointing
    if checkpointing is not None and len(checkpointing) != levels:
        problems.append(
            f"memory.checkpointing: {len(checkpointing)} values for the {levels} levels of "
            f"{stage.name}; give one value, or one per level."
        )
    zero = stage.zero_optimization or {}
    zero_stage, precision = zero.get("stage", 0), stage.training.precision
    if stage.optimizer in ("adafactor", "muon") and (zero_stage or precision != "fp32"):
        problems.append(
            f"training.optimizer: {stage.optimizer} takes whole matrices, which ZeRO flattens; set "
            f"training.precision to fp32 and deepspeed.zero_optimization.stage to 0, or take "
            f"adamw_8bit."
        )
    is_free = stage.zero_optimization is None  # to be chosen
    can_be_bf16 = precision == "bf16" and (is_free or is_offloaded(zero, "offload_optimizer"))
    if stage.optimizer == "adamw_bf16" and not can_be_bf16:
        problems.append(
            "training.optimizer: adamw_bf16 is DeepSpeed's for a bf16 network whose optimizer is "
            "offloaded; set training.precision to bf16 and "
            'deepspeed.zero_optimization.offload_optimizer to {"device": "cpu"}.'
        )
    if stage.optimizer_in_backward:
        problems += _in_backward_checks(stage)
    if stage.training.compile:
        problems += _compile_checks(stage)
    if stage.training.deterministic and stage.training.cudnn_benchmark:
        problems.append(
            "training.cudnn_benchmark: what is fastest may be another each time, which "
            "training.deterministic excludes; set one of them to false."
        )
    return problems


def _compile_checks(stage: StageConfig) -> list[str]:
    key = "training.compile"
    problems = []
    if (stage.zero_optimization or {}).get("stage", 0) == 3:
        problems.append(
            f"{key}: ZeRO-3 gathers weights between the layers that a compiled network joins; set "
            f"deepspeed.zero_optimization.stage to 2 or less, or {key} to false."
        )
    for name in ("optimizer_in_backward", "offload_activations"):
        if getattr(stage, name):
            problems.append(
                f"{key}: memory.{name} acts between the layers that a compiled network joins, and "
                f"would save nothing; set one of them to false."
            )
    return problems


def _in_backward_checks(stage: StageConfig) -> list[str]:
    key, training = "memory.optimizer_in_backward", stage.training
    problems = []
    if training.grad_clip is not None:
        problems.append(
            f"{key}: training.grad_clip {training.grad_clip} needs the norm of all gradients "
            f"before the first is applied; set it to null."
        )
    if stage.micro_batch not in (None, stage.global_batch):
        problems.append(
            f"{key}: a gradient is applied as soon as it appears, so none can be accumulated; set "
            f"training.global_batch to micro_batch ({stage.name}: {stage.global_batch} and "
            f"{stage.micro_batch})."
        )
    if training.precision != "fp32" or (stage.zero_optimization or {}).get("stage", 0):
        problems.append(
            f"{key}: exact fp32 weights on one card; set training.precision to fp32 and leave "
            f"deepspeed.zero_optimization out."
        )
    if stage.optimizer == "adamw_bf16":
        problems.append(f"{key}: takes the optimizers adamw, adamw_8bit, adafactor and muon.")
    return problems


def _deepspeed_checks(config: Config) -> list[str]:
    problems = deepspeed_problems(config.deepspeed)
    if problems:
        return problems
    zero = config.deepspeed.get("zero_optimization", {})
    precision = config.training.precision
    is_written = "zero_optimization" in config.deepspeed
    if precision != "fp32" and is_written and zero.get("stage", 0) == 0:
        problems.append(
            f"training.precision: {precision} needs fp32 master weights, which ZeRO keeps; set "
            f"deepspeed.zero_optimization.stage to 1 or more, or precision to fp32."
        )
    where = "deepspeed.zero_optimization"
    problems += _offload_checks(where, zero)
    if zero.get("round_robin_gradients"):
        problems.append(
            f"{where}.round_robin_gradients: DeepSpeed 0.19 then tells of its masters in another "
            f"order than it keeps them in, and what is saved would be mixed up; leave it out."
        )
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        problems.append(
            f"{where}.offload_optimizer.device: averages and checkpoints are made of the masters "
            f"where they are, which has to be memory; set it to cpu."
        )
    if zero.get("zenflow") is not None:
        problems.append(
            f"{where}.zenflow: keeps masters and moments of its own, which would not be saved; "
            f"leave it out."
        )
    return problems


def _offload_checks(where: str, zero: dict[str, Any]) -> list[str]:
    """What DeepSpeed would leave undone without a word, or end of with a traceback."""
    problems = []
    stage = zero.get("stage", 0)
    for key, least, what in (
        ("offload_optimizer", 1, "the optimizer"),
        ("offload_param", 3, "the weights"),
    ):
        if is_offloaded(zero, key) and stage < least:
            problems.append(
                f"{where}.{key}: ZeRO-{stage} moves {what} nowhere; set "
                f"{where}.stage to {least}{'' if least == 3 else ' or more'}, or leave it out."
            )
    param = zero.get("offload_param") or {}
    if param.get("device") == "nvme" and param.get("nvme_path") is None:
        problems.append(
            f"{where}.offload_param.nvme_path: null, with device nvme; name a folder on the drive."
        )
    for old, new in (
        ("cpu_offload", 'offload_optimizer, {"device": "cpu"}'),
        ("cpu_offload_param", 'offload_param, {"device": "cpu"}'),
        ("cpu_offload_use_pin_memory", "pin_memory in offload_optimizer and offload_param"),
    ):
        if zero.get(old):
            problems.append(f"{where}.{old}: is a name that DeepSpeed gave up; write {new}.")
    if zero.get("legacy_stage1"):
        problems.append(
            f"{where}.legacy_stage1: DeepSpeed has it no more; leave it out, ZeRO-1 needs none."
        )
    return problems
