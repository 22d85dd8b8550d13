"""Training of a cascade: one U-Net after another, each with an engine of its own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from imagen_scale.config import Config, told_of_recipe
from imagen_scale.data.encoder import encoder_fingerprint, encoder_folder
from imagen_scale.data.prepared import prepare
from imagen_scale.errors import UsageError, option
from imagen_scale.planning.setup import check_ranks
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import is_finished
from imagen_scale.training import ranks
from imagen_scale.training.agreement import agree
from imagen_scale.training.beats import PREPARING
from imagen_scale.training.choice import check_precision
from imagen_scale.training.job import Job
from imagen_scale.training.lowres_samples import check_stage_before
from imagen_scale.training.may_continue import (
    check_run,
    check_split,
    check_text_width,
    keep_warmup,
    open_run,
    unet_numbers,
)
from imagen_scale.training.meeting import Meeting
from imagen_scale.training.origin import Origin, check_encoder, find_origin
from imagen_scale.training.owner import Owner, check_owner
from imagen_scale.training.preemption import StopRequest
from imagen_scale.training.ranks import from_rank_0, rank, world_size
from imagen_scale.training.switches import prepare_determinism
from imagen_scale.training.teacher import find_teacher, take_over
from imagen_scale.training.telemetry import say as say_aloud
from imagen_scale.training.threads import share_cores
from imagen_scale.training.unet import train_unet


def train(
    config: Config,
    run_dir: Path,
    meeting: Meeting,
    *,
    unet_number: int | None = None,
    resume: bool = False,
    fresh: bool = False,
    plan_check: int | None = None,
) -> None:
    """Trains every U-Net of a cascade in turn, or one.

    Started again after an interruption it goes on where the newest good checkpoint stands.

    Args:
        config: The run.
        run_dir: Where everything is written.
        meeting: Of the ranks, its watchdog entered where there are several.
        unet_number: Train this one only, from 1; None takes the configuration's, else all.
        resume: Refuse to start from nothing.
        fresh: Delete what an earlier run left in `run_dir` and start anew.
        plan_check: Compare predicted with measured memory after so many steps of each U-Net.

    Raises:
        Preempted: If SIGTERM, SIGUSR1, SIGHUP or SIGINT asked to stop; everything is saved.
        ImagenScaleError: With what to do next.
    """
    prepare_determinism(config.training)
    share_cores()
    meeting.watchdog.timeout = config.training.hang_timeout
    say = say_aloud if rank() == 0 else _silent
    # On every rank: one that went on alone would wait for the others for ever. And all before
    # anything is written.
    numbers = unet_numbers(config, unet_number)
    for number in numbers:
        stage = config.stage(number)
        check_ranks(stage, world_size())  # what is planned comes after the data
        if plan_check is not None and plan_check > stage.steps:
            raise UsageError(
                f"{option('plan_check')} {plan_check}: {stage.name} has {stage.steps} steps "
                f"(training.steps); compare after one of them."
            )
    config = keep_warmup(config, run_dir, fresh=numbers if fresh else [])
    check_run(config, run_dir, say, resume=resume, fresh=numbers if fresh else [])
    origins = find_origins(config, numbers, run_dir, fresh=fresh)
    for number in numbers:
        check_stage_before(config.stage(number), run_dir, numbers)
    check_owner(run_dir, numbers)
    ranks.check_machine()
    check_precision(config)
    # Prepared before the group is joined: it may take longer than any collective may wait.
    with meeting.watchdog.phase(PREPARING):
        prepared = prepare(config, progress=_progress(say), only=_sizes_read(config, numbers))
        check_text_width(config, prepared.embeddings.dim)
        check_split(config, prepared.source)
        fingerprint = encoder_fingerprint(encoder_folder(config.text_encoder))
        for origin in origins.values():
            check_encoder(origin, fingerprint, config.text_encoder)
        call: dict[str, Any] = {"--unet": unet_number, "--fresh": fresh, "--plan-check": plan_check}
        call |= {f"the weights that U-Net {n} starts from": o.sha256 for n, o in origins.items()}
        agree(meeting, config, call, prepared, run_dir)
    meeting.join()
    owner = Owner(run_dir, numbers, say)
    try:
        from_rank_0(owner.take)
        from_rank_0(
            lambda: open_run(
                config, run_dir, fresh=numbers if fresh else [], report=prepared.report
            )
        )
        if recipe := told_of_recipe(config):
            say(recipe)
        if prepared.source.attribution:
            say(f"pictures: {prepared.source.attribution}")
        with StopRequest() as request:
            for number in numbers:
                if config.distill is not None and config.stage(number).few_steps is None:
                    if number in origins:
                        from_rank_0(partial(take_over, origins[number], run_dir, say))
                    continue
                train_unet(
                    Job(
                        config, number, run_dir, prepared,
                        say=say, request=request, watchdog=meeting.watchdog,
                        plan_check=plan_check, origin=origins.get(number),
                    )
                )  # fmt: skip
        say(f"run: {run_dir}")
    finally:
        owner.release()
        ranks.stop()


def _sizes_read(config: Config, numbers: list[int]) -> set[int]:
    """Of the pictures that training reads: each U-Net's own, and what the one before redraws."""
    sizes = set()
    for stage in map(config.stage, numbers):
        sizes.add(stage.size)
        if stage.small_size is not None and stage.training.lowres_samples:
            sizes.add(stage.small_size)
    return sizes


def find_origins(
    config: Config, numbers: list[int], run_dir: Path, *, fresh: bool
) -> dict[int, Origin]:
    """What each U-Net starts from, and of students their teachers; none for random weights.

    What is trained to its end needs none any more.

    Raises:
        ConfigError: If one cannot be started from.
    """
    found = {}
    for number in numbers:
        if not fresh and is_finished(inference_path(run_dir, number), config.stage(number).steps):
            continue
        if config.distill is not None:
            found[number] = find_teacher(config, number, run_dir)
        elif (origin := find_origin(config, number, run_dir, fresh=fresh)) is not None:
            found[number] = origin
    return found


def _silent(message: str) -> None:
    """Ranks other than 0 say nothing."""


def _progress(say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """Tells of long preparations once in a while."""
    import time

    last = time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 5:
            last = time.monotonic()
            say(f"preparing {what}: {done} of {total}")

    return progress
