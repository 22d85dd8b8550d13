"""Training of one U-Net: how it is tried, tried again, and given up."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from imagen_scale.errors import EnvironmentProblem, ImagenScaleError
from imagen_scale.planning.planner import Planner
from imagen_scale.planning.report import in_words
from imagen_scale.planning.setup import Setup
from imagen_scale.training.choice import choose_setup, keep_setup, smaller
from imagen_scale.training.job import Job
from imagen_scale.training.loop import Finished, GoBack, save_checkpoint, train_steps
from imagen_scale.training.memory_use import (
    is_out_of_memory,
    release_memory,
    return_freed_host_memory,
)
from imagen_scale.training.ranks import from_rank_0, told_by_rank_0, world_size
from imagen_scale.training.session import Session
from imagen_scale.training.switches import switched

T = TypeVar("T")


@dataclass(frozen=True)
class OutOfMemory:
    """The card's or the host's memory was full."""

    message: str  # the allocator's


def train_unet(job: Job) -> None:
    """Trains one U-Net from its newest checkpoint, or from nothing, to its last step.

    Does nothing when that was reached before. Goes back to the newest checkpoint once when too
    many steps in a row are left out, and halves the micro-batch whenever memory runs out.

    Raises:
        Preempted: If somebody asked to stop.
        EnvironmentProblem: If memory runs out and nothing smaller is left, or there are several
            ranks; or if something of the last step could not be saved.
        ImagenScaleError: If training diverges, or too many steps are left out again.
    """
    if from_rank_0(job.saver.is_finished):
        job.say(f"{job.stage.name}: already trained ({job.stage.steps} steps)")
        return
    with job.watchdog.phase("planning"):  # rank 0 may take a minute: no collective waits for it
        setup: Setup = told_by_rank_0(
            lambda: choose_setup(job.stage, job.run_dir, job.machine, job.say)
        )
    if setup.zero_stage == 3 or setup.offloads_optimizer:
        return_freed_host_memory()
    has_gone_back = False
    while True:
        with switched(job.stage.training):
            outcome = _attempt(job, setup)
        release_memory()  # of the attempt, which nothing refers to any more
        if isinstance(outcome, Finished):
            return
        if isinstance(outcome, Setup):
            setup = outcome
            continue
        if has_gone_back:
            raise _given_up(outcome)
        job.say(f"{outcome.reason}; going back to the newest checkpoint, once")
        has_gone_back = True


def _attempt(job: Job, setup: Setup) -> Finished | GoBack | Setup:
    """Trains from the newest checkpoint; a setup is what to try next, from there."""
    session = _unless_memory_runs_out(lambda: _build(job, setup))
    if isinstance(session, OutOfMemory):
        return _take_less(job, setup, 0, session)
    with session:
        outcome = _unless_memory_runs_out(lambda: _train(job, session))
        if not isinstance(outcome, OutOfMemory):
            return outcome
        less = _take_less(job, setup, session.step, outcome)
        release_memory()
        if session.has_whole_unsaved_steps:
            # Weights and moments are whole: no step is lost, nor what else is due after it.
            save_checkpoint(session, job)
        return less


def _build(job: Job, setup: Setup) -> Session:
    with job.watchdog.phase("building"):
        session = Session(job.stage, setup, job.say, origin=job.origin)
        crop, size = job.stage.unet.crop, job.stage.size
        pixels = f"{size} px" if crop is None else f"{crop} px crops of {size} px"
        job.say(
            f"{job.stage.name}: {session.num_parameters / 1e6:.1f} M parameters, {pixels}, "
            f"{len(job.samples.train)} pictures; {in_words(setup)}"
        )
        if job.origin is not None:
            job.say(job.origin.said_of(job.stage))
    return session


def _train(job: Job, session: Session) -> Finished | GoBack:
    with job.watchdog.phase("loading a checkpoint"):
        job.saver.resume(session)
    if session.step < job.stage.steps or job.owed is not None:
        outcome = train_steps(session, job)
        if isinstance(outcome, GoBack):
            return outcome
    else:  # the file for sampling was lost or damaged
        job.saver.save_inference(session)
    job.saver.finish()
    return Finished()


def _unless_memory_runs_out(work: Callable[[], T]) -> T | OutOfMemory:
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the activations
        return OutOfMemory(str(error))


def _take_less(job: Job, setup: Setup, step: int, full: OutOfMemory) -> Setup:
    """Half the micro-batch: the global batch and its gradient stay the same.

    Args:
        job: The training.
        setup: In force when memory ran out.
        step: Steps done by then.
        full: What the allocator said.

    Raises:
        EnvironmentProblem: If there is nothing smaller, or only a new start can take it.
    """
    where = f"{job.stage.name}: out of memory at step {step + 1} ({full.message})"
    less = smaller(setup)
    if less is None:
        raise EnvironmentProblem(f"{where}. {_advice(job, setup)}")
    keep_setup(job.stage, job.run_dir, less)
    change = (
        f"{less.micro_batch} x {less.accumulation} accumulated instead of "
        f"{setup.micro_batch} x {setup.accumulation}"
    )
    if world_size() > 1:
        # The other ranks wait in some exchange: only a new start brings all back together.
        raise EnvironmentProblem(
            f"{where}. Run the same command again: it continues from the newest checkpoint "
            f"with {change}; the global batch stays {less.global_batch}."
        )
    job.say(f"{where}; going on with {change}; the global batch stays {less.global_batch}")
    return less


def _advice(job: Job, setup: Setup) -> str:
    plan = Planner(job.stage, job.machine).plan()
    knobs = (
        "memory.checkpointing blocks, memory.offload_activations, "
        "deepspeed.zero_optimization with offload_optimizer, or unets[i].crop"
    )
    if plan.fault is None and plan.choice.setup != setup:
        return f"Set {knobs}; `imagen-scale plan` would take: {in_words(plan.choice.setup)}."
    return f"Nothing smaller is left in this setup. Set {knobs}."


def _given_up(again: GoBack) -> ImagenScaleError:
    return ImagenScaleError(
        f"{again.reason}, and so again after going back. Nothing of it reached the weights. Lower "
        f"it with --set training.lr=..., train with --set training.precision=fp32, or look at the "
        f"pictures named; then run the command again: it continues from the newest checkpoint."
    )
