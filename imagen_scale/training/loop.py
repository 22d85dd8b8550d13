"""The steps of one attempt, and what happens between them."""

import math
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from imagen_scale.config import StageConfig
from imagen_scale.data.loading import batches
from imagen_scale.data.sequence import Batch
from imagen_scale.errors import ImagenScaleError
from imagen_scale.training.best import keep_if_best
from imagen_scale.training.feed import Feed
from imagen_scale.training.job import Job
from imagen_scale.training.memory_use import check_plan
from imagen_scale.training.preemption import Preempted
from imagen_scale.training.preview import show_grid
from imagen_scale.training.quarters import losses_by_quarter
from imagen_scale.training.ranks import from_rank_0, mean_over_ranks, rank, world_size
from imagen_scale.training.rates import learning_rate
from imagen_scale.training.session import Session
from imagen_scale.training.skipped_steps import SkippedSteps
from imagen_scale.training.spikes import Spikes, reports_before
from imagen_scale.training.stepping import Stepped
from imagen_scale.training.telemetry import Telemetry
from imagen_scale.training.validation import num_validated, validate


@dataclass(frozen=True)
class Finished:
    """The last step is done."""


@dataclass(frozen=True)
class GoBack:
    """Training is to start again from the newest checkpoint."""

    reason: str


@dataclass(frozen=True)
class Due:
    """What happens after a step, in the order of the fields.

    The report comes first: it looks for weights that are not finite, so that nothing is saved of a
    diverged state, and it ends the mean of the losses there, so that a resumed run reports the same
    means. What is kept of this step for good comes before the checkpoint: a run that was killed
    goes on behind that, and makes it no more. The file for sampling comes after it, for that is
    what says that all is done; pictures are drawn from that file.

    A request to stop makes report and checkpoint due, puts off pictures, and ends training last.
    """

    report: bool
    validation: bool
    snapshot: bool  # of the averages of `training.ema_widths`
    checkpoint: bool
    inference: bool  # the file for sampling
    pictures: bool

    @classmethod
    def after(
        cls, step: int, stage: StageConfig, *, log_every: int, is_stopping: bool = False
    ) -> "Due":
        """What is due after optimizer step `step`, from 1; at the last one everything is.

        Args:
            step: The step that was done.
            stage: Says how often.
            log_every: Steps between reports.
            is_stopping: Whether somebody asked to stop.
        """
        training = stage.training

        def every(steps: int | None) -> bool:
            return steps is not None and (step % steps == 0 or step == stage.steps)

        checkpoint, pictures = every(training.checkpoint_every), every(training.sample_every)
        inference = checkpoint or pictures
        snapshot = bool(training.ema_widths) and every(stage.ema_snapshot_every)
        validation = every(training.val_every)
        saves = inference or snapshot or (validation and training.keep_best is not None)
        return cls(
            report=every(log_every) or saves or is_stopping,
            validation=validation,
            snapshot=snapshot,
            checkpoint=checkpoint or is_stopping,
            inference=inference,
            pictures=pictures and not is_stopping,
        )


def train_steps(session: Session, job: Job) -> Finished | GoBack:
    """Trains from where the session stands to the last step; all ranks together.

    Raises:
        Preempted: If somebody asked to stop.
        ImagenScaleError: If the weights are not finite.
    """
    stage, watchdog, first = session.stage, job.watchdog, session.step
    loaded = Feed(watchdog.loading(_micro_batches(session, job)), session.engine.device)
    before = from_rank_0(lambda: reports_before(job.run_dir, stage.number, first))
    skipped, spikes = SkippedSteps(job), Spikes(job, before)
    taken: list[Stepped] = []  # by this rank since the last report
    with _telemetry(session, job) as telemetry, watchdog.phase("step"):
        if job.owed is not None and job.owed[0] == session.step:
            _carry_out(job.owed[1], session, job, telemetry)
        while session.step < stage.steps:
            lr = learning_rate(stage, session.step)
            # The first one may be slow on one rank only: it allocates and compiles.
            with watchdog.phase("first step" if session.step == first else "step"):
                stepped = session.stepper.step(loaded, lr)
            session.step += 1
            watchdog.stepped(session.step)
            for profile in session.profiles:  # of all steps, those that were left out included
                profile.update(session.step)
            if stepped.applied:
                session.ema.update(session.step)
                taken.append(stepped)
                skipped.end_of_row()
            elif (reason := skipped.tell(session.step, stepped, telemetry)) is not None:
                return GoBack(reason)
            if session.step == job.plan_check:
                check_plan(stage, session.setup, session.baseline, job.say)
            if telemetry is not None:
                telemetry.advance(session.step)
            signum = job.request.agreed(session.engine.device)
            due = Due.after(
                session.step, stage,
                log_every=job.config.logging.log_every, is_stopping=bool(signum),
            )  # fmt: skip
            if due.report:
                _report(session, telemetry, lr, taken, spikes)
                taken = []
            _carry_out(due, session, job, telemetry)
            if signum:
                raise _preempted(session, signum)
    return Finished()


def save_checkpoint(session: Session, job: Job) -> None:
    """Saves where the session stands; one that fails is said, and training goes on."""
    with job.watchdog.phase("saving"):
        job.saver.save(session)


def _micro_batches(session: Session, job: Job) -> Iterator[Batch]:
    """This rank's share of all steps that are left."""
    return batches(
        job.samples.train,
        start_step=session.step,
        steps=session.stage.steps - session.step,
        global_batch=session.setup.global_batch,
        micro_batch=session.setup.micro_batch,
        rank=rank(),
        world_size=world_size(),
        num_workers=job.num_workers,
    )


def _telemetry(session: Session, job: Job) -> AbstractContextManager[Telemetry | None]:
    """Telemetry on rank 0, None on the others; all ranks together."""
    telemetry = None

    def make() -> None:
        nonlocal telemetry
        stage = session.stage
        telemetry = Telemetry(job.run_dir, job.config, stage.number, session.step, stage.steps)

    from_rank_0(make)  # ranks must not be left waiting when rank 0 cannot report
    return nullcontext() if telemetry is None else telemetry


def _carry_out(due: Due, session: Session, job: Job, telemetry: Telemetry | None) -> None:
    """Everything due but the report; what is not done yet stays in `job.owed` until it is."""
    step, phase = session.step, job.watchdog.phase

    def validation() -> None:
        if job.samples.held_out is None:
            return
        with phase("validating"):
            measures = validate(session, job.samples.held_out, job.num_workers)
        with phase("saving"):
            samples = num_validated(session, job.samples.held_out)
            keep_if_best(session, job.saver, measures, samples)
        if telemetry is not None:
            telemetry.write(step, **measures)

    def snapshot() -> None:
        with phase("saving"):
            job.saver.save_snapshots(session)

    def checkpoint() -> None:
        if session.saved_step < step:
            save_checkpoint(session, job)

    def inference() -> None:
        with phase("saving"):
            job.saver.save_inference(session)

    def pictures() -> None:
        with phase("drawing pictures"):
            from_rank_0(
                lambda: show_grid(job.run_dir, job.stage, step, job.prepared, telemetry, job.say)
            )

    for work in (validation, snapshot, checkpoint, inference, pictures):
        if getattr(due, work.__name__):
            job.owed = step, due
            work()
            due = replace(due, **{work.__name__: False})
    job.owed = None


def _report(
    session: Session, telemetry: Telemetry | None, lr: float, taken: list[Stepped], spikes: Spikes
) -> None:
    """Reports the mean of the losses since the last report.

    Raises:
        ImagenScaleError: If the average of the weights is not finite on some rank, or the loss
            jumped and training is to stop at that.
    """
    engine, step = session.engine, session.step
    losses = [stepped.loss for stepped in taken]
    loss = mean_over_ranks(torch.stack(losses).mean()) if losses else math.nan
    quarters = losses_by_quarter(session.objective.schedule, taken)
    not_finite = 0.0 if session.ema.is_finite() else 1.0
    if mean_over_ranks(torch.tensor(not_finite, device=engine.device)) > 0:
        raise ImagenScaleError(
            f"{session.stage.name}: training diverged before step {step}: the weights are "
            f"not finite; nothing of it was saved. Lower it with --set training.lr=... or "
            f"raise training.warmup_steps, and run the command again: it continues from the "
            f"newest checkpoint. If that diverges too, start anew with --fresh."
        )
    norm = engine.grad_norm()
    if telemetry is not None:
        telemetry.train(
            step,
            loss=loss if math.isfinite(loss) else None,
            lr=lr,
            grad_norm=norm,
            loss_scale=engine.loss_scale,
            images=session.setup.global_batch,
            quarters=quarters,
        )
    spikes.look(step, loss, norm, session.saved_step)


def _preempted(session: Session, signum: int) -> Preempted:
    name, step, steps = signal.Signals(signum).name, session.step, session.stage.steps
    if session.saved_step == step:
        what = f"stopped by {name} after step {step} of {steps}; everything is saved"
    else:
        what = (
            f"stopped by {name} after step {step} of {steps}, which could not be saved; "
            f"the newest checkpoint is of step {session.saved_step}"
        )
    return Preempted(f"{session.stage.name}: {what}. The same command continues it.", signum)
