"""What may be trained into a run's folder, checked before anything is written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagen_scale.config import Config, dump_config, load_config
from imagen_scale.data.sources.opening import Source
from imagen_scale.data.split import split
from imagen_scale.errors import ConfigError, DataError, UsageError
from imagen_scale.files.atomic import clear_temporary, write_atomically
from imagen_scale.files.caches import expanded
from imagen_scale.runs.checkpoint import list_checkpoints
from imagen_scale.runs.folders import (
    config_path,
    data_report_path,
    grid_paths,
    inference_path,
    samples_dir,
    unet_dir,
)
from imagen_scale.runs.inference import is_finished

# Keys of `training` that bend the loss curve: they may change, and that is said.
_TOLD = ("steps", "lr", "lr_schedule", "warmup_steps", "weight_decay",
         "decay_matrices_only", "betas", "grad_clip",
         "ema_decay", "precision")  # fmt: skip
# What may change when a run is continued: sections whole (None), or some of their keys.
_MAY_CHANGE: dict[str, tuple[str, ...] | None] = {
    "logging": None,
    "memory": None,
    "deepspeed": None,  # checkpoints fit every ZeRO stage
    "text": ("batch_size",),
    "data": ("num_workers", "cache_dir", "cache_images_gb", "max_bad_fraction",
             "follow_symlinks"),
    "imagen": ("only_train_unet_number", "dynamic_thresholding_percentile",
               "lowres_sample_noise_level"),
    "training": ("micro_batch", "optimizer", "checkpoint_every", "keep_checkpoints", "keep_every",
                 "max_skipped", "on_spike", "hang_timeout", "val_every", "val_batches", "val_x0",
                 "keep_best", "ema_snapshot_every",
                 "sample_every", "sample_prompts", "sample_steps", "sample_cond_scale",
                 "tf32", "cudnn_benchmark", "compile", "channels_last", "deterministic",
                 *_TOLD),
}  # fmt: skip


# Folders, which have several spellings.
_PLACES = ("data.path", "text.encoder", "training.start_from", "distill.teacher")


def unet_numbers(config: Config, asked: int | None) -> list[int]:
    """The U-Nets to train, from 1: the one asked for or configured, else all.

    Raises:
        UsageError: If there is no such U-Net.
        ConfigError: If the pictures cannot have that many channels.
    """
    if config.imagen.channels != 3:
        raise ConfigError(
            f"imagen.channels: {config.imagen.channels}; training pictures are RGB: write 3."
        )
    number = asked or config.imagen.only_train_unet_number
    if number is None:
        return list(range(1, len(config.unets) + 1))
    return [config.check_number(number, "unet")]


def check_text_width(config: Config, dim: int) -> None:
    """Refuses a declared feature width that is not the encoder's.

    Raises:
        ConfigError: Naming the key.
    """
    declared = {"imagen.text_embed_dim": config.imagen.text_embed_dim}
    for i, unet in enumerate(config.unets):
        declared[f"unets.{i}.text_embed_dim"] = unet.text_embed_dim
    for key, value in declared.items():
        if value not in (None, dim):
            raise ConfigError(
                f"{key}: {value}, but the encoder {config.text_encoder!r} gives {dim}; write "
                f"{dim} or null."
            )


def check_split(config: Config, source: Source) -> None:
    """Refuses a split of the pictures with an empty part.

    Raises:
        DataError: With the share that did it.
    """
    train, held_out = split(config.data, source)
    if not train or (config.data.val_fraction > 0 and not held_out):
        raise DataError(
            f"data.val_fraction: {config.data.val_fraction} of {len(source)} pictures leaves none "
            f"to {'hold out' if train else 'train on'}; change it or add pictures"
            + (", or take smaller groups (data.val_group)." if config.data.val_group else ".")
        )


def check_run(
    config: Config, run_dir: Path, say: Callable[[str], None], *, resume: bool, fresh: list[int]
) -> None:
    """Refuses what cannot be continued.

    Args:
        config: The run.
        run_dir: Its folder, which may hold an earlier run.
        say: Told of what changed and may change.
        resume: Whether there has to be a run to continue.
        fresh: U-Nets whose earlier training is to be deleted.

    Raises:
        UsageError: If there is nothing to resume, or the folder is not a run's.
        ConfigError: If `run_dir` belongs to a run with another configuration.
    """
    saved = config_path(run_dir)
    if not saved.is_file():
        if resume:
            raise UsageError(
                f"--resume: {run_dir} holds no run yet. Leave --resume out to start one."
            )
        if run_dir.exists() and (not run_dir.is_dir() or _holds_anything(run_dir)):
            raise UsageError(
                f"{run_dir} exists and is not a run (it has no config.json); nothing is written "
                f"into it. Name another folder with --run."
            )
        return
    others = _half_trained(config, run_dir, fresh) if fresh else []
    if fresh and not others:
        return
    before = load_config(saved)
    refused, told = _changes(before, config)
    anew = tuple(f"unets.{number - 1}." for number in fresh)
    if refused := [change for change in refused if not change.startswith(anew)]:
        remedy = (
            f"{' and '.join(f'U-Net {number}' for number in others)}, half-trained there, could "
            f"not go on with it. Undo the change, train that to its end first, or start all anew "
            f"with --fresh alone."
            if others
            else "Undo the change, write to another folder with --run, or start anew with --fresh."
        )
        raise ConfigError(
            f"{run_dir} was started with another configuration:\n  "
            + "\n  ".join(refused) + f"\n{remedy}"
        )  # fmt: skip
    for change in told:
        say(f"changed since this run was started: {change}")


def keep_warmup(config: Config, run_dir: Path, *, fresh: list[int]) -> Config:
    """A run's configuration with the warm-up that its U-Nets began with.

    Where `training.warmup_steps` is null it follows from the steps; a training that is made longer
    would rise once more, from far below the rate that it had reached.

    Args:
        config: The run, as it is asked for now.
        run_dir: Its folder, which may hold an earlier run.
        fresh: U-Nets that begin anew.
    """
    if config.training.warmup_steps is not None or not config_path(run_dir).is_file():
        return config
    if len(fresh) == len(config.unets):
        return config
    stages, before = config.stages(), load_config(config_path(run_dir)).stages()
    if len(stages) != len(before):
        return config  # refused by `check_run`
    warmups = [
        old.warmup_steps
        if new.number not in fresh and list_checkpoints(unet_dir(run_dir, new.number))
        else new.warmup_steps
        for new, old in zip(stages, before, strict=True)
    ]
    if warmups == [stage.warmup_steps for stage in stages] or any(
        warmup >= stage.steps for warmup, stage in zip(warmups, stages, strict=True)
    ):
        return config
    kept = warmups[0] if len(set(warmups)) == 1 else tuple(warmups)
    training = config.training.model_copy(update={"warmup_steps": kept})
    return config.model_copy(update={"training": training})


def _half_trained(config: Config, run_dir: Path, fresh: list[int]) -> list[int]:
    """U-Nets beside those trained anew that have begun and would be continued."""
    return [
        stage.number
        for stage in config.stages()
        if stage.number not in fresh
        and list_checkpoints(unet_dir(run_dir, stage.number))
        and not is_finished(inference_path(run_dir, stage.number), stage.steps)
    ]


def _holds_anything(folder: Path) -> bool:
    """Whether there is more than a training leaves that was killed as it began."""
    return any(not path.match(".*unet*.owner*") for path in folder.iterdir())


def open_run(
    config: Config, run_dir: Path, *, fresh: list[int], report: Path | None = None
) -> None:
    """Makes the run's folder.

    Args:
        config: The run.
        run_dir: Its folder.
        fresh: U-Nets whose earlier training is deleted.
        report: data_report.json of the prepared data, copied into the run.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for path in (config_path(run_dir), data_report_path(run_dir)):
        clear_temporary(run_dir, path.name)
    clear_temporary(run_dir, ".unet*.owner.*")
    clear_temporary(samples_dir(run_dir), "unet*_step_*")
    for number in fresh:
        shutil.rmtree(unet_dir(run_dir, number), ignore_errors=True)
        for picture in grid_paths(run_dir, number):
            picture.unlink()
    write_atomically(
        config_path(run_dir),
        lambda temporary: temporary.write_text(dump_config(config), encoding="utf-8"),
    )
    if report is not None:
        write_atomically(
            data_report_path(run_dir), lambda temporary: shutil.copy(report, temporary)
        )


def _place(written: Any) -> Any:
    if isinstance(written, list):
        return [_place(one) for one in written]
    return os.path.realpath(expanded(written)) if isinstance(written, str) else written


def _changes(before: Config, now: Config) -> tuple[list[str], list[str]]:
    """Differences as 'key: old -> new': those that make it another run, and those to be told."""
    refused: list[str] = []
    told: list[str] = []

    def compare(path: str, old: Any, new: Any) -> None:
        section, _, key = path.partition(".")
        allowed = _MAY_CHANGE.get(section, ())
        if old == new or allowed is None or (path in _PLACES and _place(old) == _place(new)):
            return
        if key in allowed:
            if section == "training" and key in _TOLD:
                told.append(f"{path}: {old} -> {new}")
        elif isinstance(old, dict) and isinstance(new, dict):
            for name in old | new:
                compare(f"{path}.{name}".lstrip("."), old.get(name), new.get(name))
        elif path == "unets" and len(old) == len(new):
            for i, pair in enumerate(zip(old, new, strict=True)):
                compare(f"{path}.{i}", *pair)
        else:
            refused.append(f"{path}: {old} -> {new}")

    compare("", before.model_dump(mode="json"), now.model_dump(mode="json"))
    return refused, told
