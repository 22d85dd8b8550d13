"""Training of a cascade: one U-Net after another, each with an engine of its own."""

import functools
import math
import signal
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from imagen_scale.config import Config
from imagen_scale.data.loading import batches
from imagen_scale.data.prepared import Prepared
from imagen_scale.data.seeds import seeded
from imagen_scale.data.sequence import CaptionedImages, split_indices
from imagen_scale.errors import CheckpointError, EnvironmentProblem, ImagenScaleError
from imagen_scale.models.memory import apply_checkpointing, in_host_memory
from imagen_scale.models.unet import UNet
from imagen_scale.planning.machine import this_machine
from imagen_scale.planning.planner import Planner
from imagen_scale.planning.report import in_words
from imagen_scale.planning.setup import Setup
from imagen_scale.training import distributed
from imagen_scale.training.choice import choose_setup, remember, smaller
from imagen_scale.training.ema import Ema
from imagen_scale.training.loop import learning_rate
from imagen_scale.training.memory_use import (
    check_plan,
    forget_peaks,
    host_bytes,
    is_out_of_memory,
    release_memory,
    return_freed_host_memory,
)
from imagen_scale.training.objective import Objective
from imagen_scale.training.preemption import Preempted, StopRequest
from imagen_scale.training.preview import draw_grid
from imagen_scale.training.ranks import from_rank_0, rank, world_size
from imagen_scale.training.saving import Saver
from imagen_scale.training.stepping import Stepped, Stepper
from imagen_scale.training.telemetry import Telemetry
from imagen_scale.training.watchdog import Watchdog


class UnetTraining:
    """Training of one U-Net from its newest checkpoint, or from nothing, to its last step."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        unet_number: int,
        prepared: Prepared,
        say: Callable[[str], None],
        request: StopRequest,
        watchdog: Watchdog,
        plan_check: int | None = None,
    ) -> None:
        self.plan_check, self.request, self.watchdog = plan_check, request, watchdog
        self.config, self.run_dir, self.prepared, self.say = config, run_dir, prepared, say
        # The learned null embedding of every caption is as wide as the encoder's features.
        self.stage = config.stage(unet_number, prepared.embeddings.dim)
        self.training, self.steps = config.training, self.stage.steps
        self.saver = Saver(config, self.stage, run_dir, prepared, say)
        self.has_gone_back = False
        self.train_indices, self.val_indices = split_indices(
            prepared.source.keys, config.data.val_fraction
        )

    def run(self) -> None:
        """Trains to the last step; does nothing when that was reached before."""
        if from_rank_0(self.saver.is_finished):
            self.say(f"{self.stage.name}: already trained ({self.steps} steps)")
            return
        self.setup: Setup = from_rank_0(
            lambda: choose_setup(self.stage, self.run_dir, world_size(), self.say)
        )
        if self.setup.zero_stage == 3 or self.setup.offloads_optimizer:
            return_freed_host_memory()
        while not self._run_once():
            pass

    def _run_once(self) -> bool:
        """Trains from the newest checkpoint; False when it is to be tried again from there."""
        self.step, self.saved_step = 0, 0
        try:
            with self.watchdog.phase("building"):
                self._build()
            with self.watchdog.phase("loading a checkpoint"):
                self.step = self.saved_step = self.saver.resume(self.engine, self.ema, self.setup)
            if self.step < self.steps:
                self._loop()
            else:  # the file for sampling was lost or damaged
                self.saver.save_inference(self.ema, self.step)
            self.saver.finish()
            return True
        except _GoBack as reason:
            self.say(f"{reason}; going back to the newest checkpoint, once")
            self.has_gone_back = True
            return False
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the activations
            self._take_less(str(error))
            return False
        finally:
            if hasattr(self, "engine"):
                distributed.release_engine(self.engine)
                for part in ("engine", "ema", "objective", "stepper"):  # as far as it was built
                    vars(self).pop(part, None)
            release_memory()

    def _take_less(self, message: str) -> None:
        """Goes on with half the micro-batch: the global batch and its gradient stay the same."""
        setup = smaller(self.setup)
        where = f"{self.stage.name}: out of memory at step {self.step + 1} ({message})"
        if setup is None:
            raise EnvironmentProblem(f"{where}. {self._advice()}")
        remember(self.stage, self.run_dir, setup)
        change = (
            f"{setup.micro_batch} x {setup.accumulation} accumulated instead of "
            f"{self.setup.micro_batch} x {self.setup.accumulation}"
        )
        if world_size() > 1:
            # The other ranks wait in some exchange: only a new start brings all back together.
            raise EnvironmentProblem(
                f"{where}. Run the same command again: it continues from the newest checkpoint "
                f"with {change}; the global batch stays {setup.global_batch}."
            )
        self.say(f"{where}; going on with {change}; the global batch stays {setup.global_batch}")
        release_memory()
        if self.step > self.saved_step and not self.stepper.is_updating:
            self._save()  # weights and moments are whole: no step is lost
        self.setup = setup

    def _advice(self) -> str:
        machine = this_machine(world_size())
        plan = Planner(self.stage, machine).plan()
        knobs = (
            "memory.checkpointing blocks, memory.offload_activations, "
            "deepspeed.zero_optimization with offload_optimizer, or unets[i].crop"
        )
        if plan.fault is None and plan.choice.setup != self.setup:
            return f"Set {knobs}; `imagen-scale plan` would take: {in_words(plan.choice.setup)}."
        return f"Nothing smaller is left in this setup. Set {knobs}."

    def _build(self) -> None:
        release_memory()
        forget_peaks()
        self.baseline = host_bytes()
        # The same initial weights on every rank and at every start.
        torch.manual_seed(seeded("init", self.training.seed, self.stage.seed_index))
        unet = UNet(self.stage.network)
        num_parameters = sum(parameter.numel() for parameter in unet.parameters())
        setup = self.setup
        hold = in_host_memory if setup.offload_activations else nullcontext
        apply_checkpointing(unet, setup.checkpointing, hold=hold).train()
        self.engine = distributed.make_engine(unet, self.stage, setup, self.say)
        self.ema = Ema(self.engine, self.training.ema_decay, offload=setup.ema_offload)
        self.objective = Objective(self.stage, self.engine.device)
        self.stepper = Stepper(self.engine, self.objective, setup.accumulation)
        crop, size = self.stage.unet.crop, self.stage.size
        pixels = f"{size} px" if crop is None else f"{crop} px crops of {size} px"
        self.say(
            f"{self.stage.name}: {num_parameters / 1e6:.1f} M parameters, {pixels}, "
            f"{len(self.train_indices)} pictures; {in_words(setup)}"
        )

    def _save(self) -> None:
        with self.watchdog.phase("saving"):
            if self.saver.save(self.engine, self.ema, self.setup, self.step):
                self.saved_step = self.step

    # Steps.

    def _dataset(self, indices: list[int], *, shuffle: bool) -> CaptionedImages:
        return CaptionedImages(
            self.prepared.images[self.stage.size],
            self.prepared.source.captions,
            self.prepared.embeddings,
            indices,
            seed=seeded("data", self.training.seed, self.stage.seed_index),
            flip=self.config.data.flip and shuffle,
            max_text_len=self.stage.unet.max_text_len,
            shuffle=shuffle,
        )

    def _loop(self) -> None:
        dataset = self._dataset(self.train_indices, shuffle=True)
        micro_batches = batches(
            dataset,
            start_step=self.step,
            steps=self.steps - self.step,
            global_batch=self.setup.global_batch,
            micro_batch=self.setup.micro_batch,
            rank=rank(),
            world_size=world_size(),
            num_workers=self.config.data.num_workers,
        )
        loaded, first = self.watchdog.loading(micro_batches), self.step
        window: list[torch.Tensor] = []
        skipped = 0  # in a row
        with self._telemetry(self.step) as telemetry, self.watchdog.phase("step"):
            while self.step < self.steps:
                lr = learning_rate(self.stage, self.step)
                # The first one may be slow on one rank only: it allocates and compiles.
                with self.watchdog.phase("first step" if self.step == first else "step"):
                    stepped = self.stepper.step(loaded, lr)
                self.step += 1
                step = self.step
                self.watchdog.stepped(step)
                if stepped.applied:
                    self.ema.update(step)
                    window.append(stepped.loss)
                    skipped = 0
                else:
                    skipped += 1
                    self._tell_skipped(telemetry, dataset, stepped, skipped)
                if step == self.plan_check:
                    self._check_plan()
                if telemetry is not None:
                    telemetry.advance(step)
                signum = self.request.agreed(self.engine.device)
                is_checkpoint = self._is_due(step, self.training.checkpoint_every)
                is_sample = self._is_due(step, self.training.sample_every)
                # Also before a checkpoint, so that none is made of a diverged state and a resumed
                # run reports the same means.
                is_report = self._is_due(step, self.config.logging.log_every)
                if is_checkpoint or is_sample or is_report or signum:
                    self._report(telemetry, lr, window)
                    window = []
                if self.val_indices and self._is_due(step, self.training.val_every):
                    with self.watchdog.phase("validating"):
                        self._validate(telemetry, step)
                if is_checkpoint or signum:
                    self._save()
                if is_checkpoint or is_sample:  # last, for it is what says that all is done
                    with self.watchdog.phase("saving"):
                        self.saver.save_inference(self.ema, step)
                if is_sample and not signum:
                    with self.watchdog.phase("drawing pictures"):
                        from_rank_0(functools.partial(self._draw, telemetry, step))
                if signum:
                    self._stop(signum)

    def _stop(self, signum: int) -> None:
        name, step = signal.Signals(signum).name, self.step
        if self.saved_step == step:
            what = f"stopped by {name} after step {step} of {self.steps}; everything is saved"
        else:
            what = (
                f"stopped by {name} after step {step} of {self.steps}, which could not be saved; "
                f"the newest checkpoint is of step {self.saved_step}"
            )
        raise Preempted(f"{self.stage.name}: {what}. The same command continues it.", signum)

    def _tell_skipped(
        self, telemetry: Telemetry | None, dataset: CaptionedImages, stepped: Stepped, skipped: int
    ) -> None:
        """Names the samples of a step that was left out; stops when there are too many in a row."""
        bad = ~stepped.losses.isfinite().cpu()
        positions = [p for p, is_bad in zip(stepped.positions, bad, strict=True) if is_bad]
        named = [self.prepared.source.keys[dataset.picture(position)] for position in positions]
        all_named: list[Any] = [None] * world_size()
        torch.distributed.all_gather_object(all_named, named)
        names = [name for of_rank in all_named for name in of_rank]
        reason = (
            f"the loss of {', '.join(names[:8])}{' ...' if len(names) > 8 else ''} was not finite"
            if names
            else "a gradient was not finite, though every loss was"
        )
        where = f"{self.stage.name}: step {self.step} left out: {reason}"
        self.say(f"WARNING: {where}")
        if telemetry is not None:
            telemetry.write(self.step, skipped=1)
        if skipped < self.training.max_skipped:
            return
        where = f"{self.stage.name}: {skipped} steps in a row left out; of the last {reason}"
        if not self.has_gone_back:
            raise _GoBack(where)
        raise ImagenScaleError(
            f"{where}, and so again after going back. Nothing of it reached the weights. Lower it "
            f"with --set training.lr=..., train with --set training.precision=fp32, or look at the "
            f"pictures named; then run the command again: it continues from the newest checkpoint."
        )

    def _draw(self, telemetry: Telemetry | None, step: int) -> None:
        try:
            drawn = draw_grid(self.run_dir, self.stage.number, step, self.prepared)
        # Pictures are a pleasure, not a reason to stop. Without the file for sampling, which a
        # full disk refused, there are none either.
        except (torch.OutOfMemoryError, OSError, CheckpointError) as error:
            self.say(f"{self.stage.name}: no pictures at step {step}: {error}")
            return
        if telemetry is not None:
            telemetry.write(step, **drawn.measures)
            telemetry.picture(step, drawn.path)

    def _telemetry(self, step: int) -> AbstractContextManager[Telemetry | None]:
        """Telemetry on rank 0, nothing on the others."""
        made: list[Telemetry] = []

        def make() -> None:
            made.append(Telemetry(self.run_dir, self.config, self.stage.number, step, self.steps))

        from_rank_0(make)  # ranks must not be left waiting when rank 0 cannot report
        return made[0] if made else nullcontext()

    def _is_due(self, step: int, every: int | None) -> bool:
        return every is not None and (step % every == 0 or step == self.steps)

    def _check_plan(self) -> None:
        check_plan(self.stage, self.setup, self.baseline, self.say)

    def _report(self, telemetry: Telemetry | None, lr: float, window: list[torch.Tensor]) -> None:
        step = self.step
        loss = self._mean_over_ranks(torch.stack(window).mean()) if window else math.nan
        not_finite = 0.0 if self.ema.is_finite() else 1.0
        if self._mean_over_ranks(torch.tensor(not_finite, device=self.engine.device)) > 0:
            raise ImagenScaleError(
                f"{self.stage.name}: training diverged before step {step}: the weights are "
                f"not finite; nothing of it was saved. Lower it with --set training.lr=... or "
                f"raise training.warmup_steps, and run the command again: it continues from the "
                f"newest checkpoint. If that diverges too, start anew with --fresh."
            )
        if telemetry is not None:
            norm = self.engine.get_global_grad_norm()
            telemetry.train(
                step,
                loss=loss if math.isfinite(loss) else None,
                lr=lr,
                grad_norm=None if norm is None else float(norm),
                images=self.setup.global_batch,
            )

    def _mean_over_ranks(self, value: torch.Tensor) -> float:
        torch.distributed.all_reduce(value)
        return value.item() / world_size()

    @torch.no_grad()
    def _validate(self, telemetry: Telemetry | None, step: int) -> None:
        """Loss on held-out pictures, with the same noise and times at every validation."""
        together = self.setup.micro_batch * world_size()
        steps = min(self.training.val_batches, math.ceil(len(self.val_indices) / together))
        held_out = batches(
            self._dataset(self.val_indices, shuffle=False),
            start_step=0,
            steps=steps,
            global_batch=together,
            micro_batch=self.setup.micro_batch,
            rank=rank(),
            world_size=world_size(),
            num_workers=0,
        )
        self.engine.eval()
        losses = [self.objective.loss(self.engine, batch, "validation") for batch in held_out]
        self.engine.train()
        loss = self._mean_over_ranks(torch.stack(losses).mean())
        if telemetry is not None:
            telemetry.write(step, val_loss=loss)


class _GoBack(Exception):
    """Training is to start again from the newest checkpoint."""
