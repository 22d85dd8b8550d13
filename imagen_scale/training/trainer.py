"""Training of a cascade: one U-Net after another, each with an engine of its own."""

import functools
import math
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from imagen_scale import checkpoint as ckpt
from imagen_scale.config import Config
from imagen_scale.data.dataset import (
    CaptionedImages,
    Prepared,
    batches,
    prepare,
    seeded,
    split_indices,
)
from imagen_scale.data.text import encoder_fingerprint, encoder_folder
from imagen_scale.errors import CheckpointError, EnvironmentProblem, ImagenScaleError
from imagen_scale.models.memory import apply_checkpointing, in_host_memory
from imagen_scale.models.unet import UNet
from imagen_scale.planning.machine import this_machine
from imagen_scale.planning.planner import Planner
from imagen_scale.planning.report import in_words
from imagen_scale.planning.setup import Setup, written_setup
from imagen_scale.training import distributed
from imagen_scale.training.choice import choose_setup, remember, smaller
from imagen_scale.training.distributed import from_rank_0, rank, together, world_size
from imagen_scale.training.ema import Ema
from imagen_scale.training.memory_use import (
    check_plan,
    forget_peaks,
    host_bytes,
    is_out_of_memory,
    release_memory,
)
from imagen_scale.training.objective import Objective
from imagen_scale.training.preview import draw_grid
from imagen_scale.training.run import (
    check_run,
    check_split,
    check_text_width,
    open_run,
    unet_numbers,
)
from imagen_scale.training.telemetry import Telemetry, say


def train(
    config: Config,
    run_dir: Path,
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
        unet_number: Train this one only, from 1; None takes the configuration's, else all.
        resume: Refuse to start from nothing.
        fresh: Delete what an earlier run left in `run_dir` and start anew.
        plan_check: Compare predicted with measured memory after so many steps of each U-Net.

    Raises:
        ImagenScaleError: With what to do next.
    """
    distributed.fill_environment()
    quiet = say if rank() == 0 else _silent
    # On every rank: one that went on alone would wait for the others for ever. And all before
    # anything is written.
    numbers = unet_numbers(config, unet_number)
    for number in numbers:
        if config.memory.budget is None:
            written_setup(config, number - 1, world_size(), on_card=False)
    check_run(config, run_dir, quiet, resume=resume, fresh=fresh)
    distributed.check_machine()
    # Prepared before the group is joined: it may take longer than any collective may wait.
    size = config.imagen.image_sizes[numbers[0] - 1] if len(numbers) == 1 else None
    prepared = prepare(config, progress=_progress(quiet), size=size)
    check_text_width(config, prepared.embeddings.dim)
    check_split(config, prepared.source.keys)
    distributed.join(quiet)
    try:
        from_rank_0(
            lambda: open_run(
                config, run_dir, fresh=numbers if fresh else [], report=prepared.report
            )
        )
        if prepared.source.attribution:
            quiet(f"pictures: {prepared.source.attribution}")
        for number in numbers:
            UnetTraining(config, run_dir, number, prepared, quiet, plan_check).run()
        quiet(f"run: {run_dir}")
    finally:
        distributed.stop()


def learning_rate(config: Config, unet_index: int, step: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then constant or cosine to zero."""
    training = config.training
    peak = config.per_unet("training", "lr", unet_index)
    steps = config.per_unet("training", "steps", unet_index)
    if step < training.warmup_steps:
        return peak * (step + 1) / training.warmup_steps
    if training.lr_schedule == "constant":
        return peak
    done = (step - training.warmup_steps) / (steps - training.warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


class UnetTraining:
    """Training of one U-Net from its newest checkpoint, or from nothing, to its last step."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        unet_number: int,
        prepared: Prepared,
        say: Callable[[str], None],
        plan_check: int | None = None,
    ) -> None:
        self.plan_check = plan_check
        self.config, self.run_dir, self.prepared, self.say = config, run_dir, prepared, say
        self.unet_number, self.index = unet_number, unet_number - 1
        self.training = config.training
        self.folder = ckpt.unet_dir(run_dir, unet_number)
        self.steps = config.per_unet("training", "steps", self.index)
        self.size = config.imagen.image_sizes[self.index]
        # The learned null embedding of every caption is as wide as the encoder's features.
        self.text_embed_dim = prepared.embeddings.dim
        self.fingerprint = encoder_fingerprint(encoder_folder(config.text_encoder))
        self.train_indices, self.val_indices = split_indices(
            prepared.source.keys, config.data.val_fraction
        )

    def run(self) -> None:
        """Trains to the last step; does nothing when that was reached before."""
        if from_rank_0(self._is_finished):
            self.say(f"U-Net {self.unet_number}: already trained ({self.steps} steps)")
            return
        self.setup: Setup = from_rank_0(
            lambda: choose_setup(
                self.config, self.run_dir, self.unet_number, self.text_embed_dim, world_size(),
                self.say,
            )
        )  # fmt: skip
        while not self._run_once():
            pass

    def _run_once(self) -> bool:
        """Trains from the newest checkpoint; False when memory ran out and less of it may do."""
        self.step, self.saved_step, self.is_updating = 0, 0, False
        try:
            self._build()
            self.step = self.saved_step = self._resume()
            if self.step < self.steps:
                self._loop()
            else:  # the file for sampling was lost or damaged
                self._save_inference(self.step)
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the activations
            self._take_less(str(error))
            return False
        finally:
            if hasattr(self, "engine"):
                distributed.release_engine(self.engine)
                del self.engine, self.ema, self.objective
            release_memory()

    def _take_less(self, message: str) -> None:
        """Goes on with half the micro-batch: the global batch and its gradient stay the same."""
        setup = smaller(self.setup)
        where = f"U-Net {self.unet_number}: out of memory at step {self.step + 1} ({message})"
        if setup is None:
            raise EnvironmentProblem(f"{where}. {self._advice()}")
        remember(self.config, self.run_dir, self.unet_number, setup)
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
        if self.step > self.saved_step and not self.is_updating:
            self._save(self.step)  # weights and moments are whole: no step is lost
        self.setup = setup

    def _advice(self) -> str:
        machine = this_machine(world_size())
        plan = Planner(self.config, self.index, self.text_embed_dim, machine).plan()
        knobs = (
            "memory.checkpointing blocks, memory.offload_activations, "
            "deepspeed.zero_optimization with offload_optimizer, or unets[i].crop"
        )
        if plan.fault is None and plan.choice.setup != self.setup:
            return f"Set {knobs}; `imagen-scale plan` would take: {in_words(plan.choice.setup)}."
        return f"Nothing smaller is left in this setup. Set {knobs}."

    def _is_finished(self) -> bool:
        path = ckpt.inference_path(self.run_dir, self.unet_number)
        if not path.is_file():
            return False
        try:
            return ckpt.read_inference(path).step >= self.steps
        except CheckpointError as error:
            self.say(f"written anew from the newest checkpoint: {error}")
            return False

    def _build(self) -> None:
        release_memory()
        forget_peaks()
        self.baseline = host_bytes()
        # The same initial weights on every rank and at every start.
        torch.manual_seed(seeded("init", self.training.seed, self.index))
        unet = UNet(self.config.unet(self.index, self.text_embed_dim))
        num_parameters = sum(parameter.numel() for parameter in unet.parameters())
        setup = self.setup
        hold = in_host_memory if setup.offload_activations else nullcontext
        apply_checkpointing(unet, setup.checkpointing, hold=hold).train()
        self.engine = distributed.make_engine(unet, self.config, self.index, setup)
        self.ema = Ema(self.engine, self.training.ema_decay, offload=setup.ema_offload)
        self.objective = Objective(self.config, self.index, self.engine.device)
        crop = self.config.unets[self.index].crop
        pixels = f"{self.size} px" if crop is None else f"{crop} px crops of {self.size} px"
        self.say(
            f"U-Net {self.unet_number}: {num_parameters / 1e6:.1f} M parameters, {pixels}, "
            f"{len(self.train_indices)} pictures; {in_words(setup)}"
        )

    # Checkpoints.

    def _resume(self) -> int:
        """Loads the newest good checkpoint; returns the steps done."""
        found = from_rank_0(lambda: ckpt.newest_good(self.folder, self.say))
        folder, manifest = found
        if folder is None:
            return 0
        for key, ours in self._facts().items():
            if manifest[key] != ours:
                raise CheckpointError(
                    f"{folder}: saved with {key} {manifest[key]}, but this run has {ours}. "
                    f"Continue it with {manifest[key]}."
                )
        if manifest["text_encoder"] != self.fingerprint:
            raise CheckpointError(
                f"{folder}: trained with another version of the text encoder "
                f"{self.config.text_encoder!r}. Put the original files back, or start anew with "
                f"--fresh."
            )
        if manifest["pictures"] != self.prepared.source.fingerprint:
            self.say(
                "the pictures changed since the checkpoint; training goes on with the new ones"
            )
        from safetensors.torch import load_file

        self.engine.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=True)
        self.ema.load_state_dict(load_file(folder / self._ema_name()))
        step: int = manifest["step"]
        self.say(f"U-Net {self.unet_number}: continues at step {step} of {self.steps}")
        return step

    def _facts(self) -> dict[str, Any]:
        """What DeepSpeed's shards depend on."""
        return {
            "processes": world_size(),
            "zero_stage": self.setup.stage,
            "optimizer": self.setup.optimizer,
            "optimizer_in_backward": self.setup.in_backward,
        }

    def _ema_name(self) -> str:
        return f"ema_rank_{rank():04d}.safetensors"

    def _save(self, step: int) -> None:
        from safetensors.torch import save_file

        staging = Path(from_rank_0(lambda: str(ckpt.staging_folder(self.folder, step))))

        def write() -> None:
            # DeepSpeed would publish `latest` before the other ranks have finished: we commit.
            self.engine.save_checkpoint(str(staging), tag="deepspeed", save_latest=False)
            save_file(self.ema.state_dict(), staging / self._ema_name())

        together(write)
        facts = {
            **self._facts(),
            "pictures": self.prepared.source.fingerprint,
            "text_encoder": self.fingerprint,
        }
        from_rank_0(lambda: str(ckpt.commit(staging, step, facts)))
        from_rank_0(lambda: ckpt.remove_old(self.folder, step, self.training.keep_checkpoints))

    def _save_inference(self, step: int) -> None:
        """Writes the EMA weights for sampling; all ranks gather, rank 0 writes."""
        path = ckpt.inference_path(self.run_dir, self.unet_number)
        weights = self.ema.named_weights()
        failure: Exception | None = None
        if rank() == 0:
            try:
                ckpt.stream_inference(
                    path,
                    self.ema.shapes(),
                    weights,
                    config=self.config,
                    unet_number=self.unet_number,
                    text_embed_dim=self.text_embed_dim,
                    text_fingerprint=self.fingerprint,
                    step=step,
                    steps=self.steps,
                )
            except Exception as error:  # the other ranks are still giving their shares
                failure = error
        for _ in weights:
            pass

        def fail_together() -> None:
            if failure is not None:
                raise failure

        from_rank_0(fail_together)

    # Steps.

    def _dataset(self, indices: list[int], *, shuffle: bool) -> CaptionedImages:
        return CaptionedImages(
            self.prepared.images[self.size],
            self.prepared.source.captions,
            self.prepared.embeddings,
            indices,
            seed=seeded("data", self.training.seed, self.index),
            flip=self.config.data.flip and shuffle,
            max_text_len=self.config.unets[self.index].max_text_len,
            shuffle=shuffle,
        )

    def _loop(self) -> None:
        step = self.step
        micro_batches = batches(
            self._dataset(self.train_indices, shuffle=True),
            start_step=step,
            steps=self.steps - step,
            global_batch=self.setup.global_batch,
            micro_batch=self.setup.micro_batch,
            rank=rank(),
            world_size=world_size(),
            num_workers=self.config.data.num_workers,
        )
        window: list[torch.Tensor] = []
        with self._telemetry(step) as telemetry:
            while step < self.steps:
                lr = learning_rate(self.config, self.index, step)
                window.append(self._step(micro_batches, lr))
                step += 1
                self.ema.update(step)
                self.step = step
                if step == self.plan_check:
                    self._check_plan()
                if telemetry is not None:
                    telemetry.advance(step)
                is_checkpoint = self._is_due(step, self.training.checkpoint_every)
                is_sample = self._is_due(step, self.training.sample_every)
                # Also before a checkpoint, so that none is made of a diverged state and a resumed
                # run reports the same means.
                if is_checkpoint or is_sample or self._is_due(step, self.config.logging.log_every):
                    self._report(telemetry, step, lr, window)
                    window = []
                if self.val_indices and self._is_due(step, self.training.val_every):
                    self._validate(telemetry, step)
                if is_checkpoint or is_sample:
                    self._save_inference(step)
                if is_checkpoint:
                    self._save(step)
                    self.saved_step = step
                if is_sample:
                    from_rank_0(functools.partial(self._draw, telemetry, step))

    def _draw(self, telemetry: Telemetry | None, step: int) -> None:
        try:
            path = draw_grid(self.run_dir, self.unet_number, step, self.prepared)
        except torch.OutOfMemoryError:  # pictures are a pleasure, not a reason to stop
            self.say(f"U-Net {self.unet_number}: no pictures at step {step}: out of memory")
            return
        if telemetry is not None:
            telemetry.picture(step, path)

    def _telemetry(self, step: int) -> AbstractContextManager[Telemetry | None]:
        """Telemetry on rank 0, nothing on the others."""
        made: list[Telemetry] = []

        def make() -> None:
            made.append(Telemetry(self.run_dir, self.config, self.unet_number, step, self.steps))

        from_rank_0(make)  # ranks must not be left waiting when rank 0 cannot report
        return made[0] if made else nullcontext()

    def _is_due(self, step: int, every: int | None) -> bool:
        return every is not None and (step % every == 0 or step == self.steps)

    def _step(self, micro_batches: Any, lr: float) -> torch.Tensor:
        """One optimizer step; returns this rank's mean loss."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.engine.device)
        for micro_step in range(1, self.setup.accumulation + 1):
            loss = self.objective.loss(self.engine, next(micro_batches))
            self.is_updating = self.setup.in_backward
            self.engine.backward(loss)
            self.is_updating |= micro_step == self.setup.accumulation
            self.engine.step()
            total += loss.detach()
        self.is_updating = False
        return total / self.setup.accumulation

    def _check_plan(self) -> None:
        check_plan(
            self.config, self.index, self.text_embed_dim, self.setup, self.baseline, self.say
        )

    def _report(
        self, telemetry: Telemetry | None, step: int, lr: float, window: list[torch.Tensor]
    ) -> None:
        loss = self._mean_over_ranks(torch.stack(window).mean())
        not_finite = 0.0 if self.ema.is_finite() else 1.0
        if self._mean_over_ranks(torch.tensor(not_finite, device=self.engine.device)) > 0:
            loss = math.nan
        if not math.isfinite(loss):
            raise ImagenScaleError(
                f"U-Net {self.unet_number}: training diverged before step {step} (loss {loss}); "
                f"nothing of it was saved. Lower it with --set training.lr=... or raise "
                f"training.warmup_steps, and run the command again: it continues from the newest "
                f"checkpoint. If that diverges too, start anew with --fresh."
            )
        if telemetry is not None:
            norm = self.engine.get_global_grad_norm()
            telemetry.train(
                step,
                loss=loss,
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
