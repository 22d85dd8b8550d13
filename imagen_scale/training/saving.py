"""Checkpoints and the inference file of a U-Net in training, written by all ranks together."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from imagen_scale.config import Config, StageConfig
from imagen_scale.data.encoder import encoder_fingerprint, encoder_folder
from imagen_scale.data.prepared import Prepared
from imagen_scale.errors import CheckpointError, DiskProblem, EnvironmentProblem
from imagen_scale.planning.setup import Setup
from imagen_scale.runs import checkpoint, folders, inference
from imagen_scale.runs.averages import list_snapshots
from imagen_scale.training.ema import Ema
from imagen_scale.training.origin import Origin
from imagen_scale.training.ranks import (
    come_to_exchange,
    from_rank_0,
    rank,
    side_by_side,
    together,
    world_size,
)
from imagen_scale.training.session import Session
from imagen_scale.training.shards import file_name, load_shards, save_shard, state_bytes

FORMAT = "imagen-scale checkpoint 1"


class Saver:
    """Saves and resumes one U-Net.

    A save that a full or unwritable disk refuses leaves the checkpoint before it, and no debris:
    training goes on and the next save is tried. Only those of the last step have to succeed, as
    `finish` demands. Any other failure is a fault, and ends training: it would come again.

    Args:
        config: The run.
        stage: The U-Net.
        run_dir: The run's folder.
        prepared: What is trained on.
        say: Told of what happens; on rank 0.
        origin: What training starts from; None for random weights.
    """

    def __init__(
        self, config: Config, stage: StageConfig, run_dir: Path, prepared: Prepared,
        say: Callable[[str], None], *, origin: Origin | None = None,
    ) -> None:  # fmt: skip
        self.config, self.stage, self.steps, self.say = config, stage, stage.steps, say
        self.origin_sha256 = None if origin is None else origin.sha256
        self._good = 0  # step of the newest checkpoint that is whole
        self._unsaved: list[str] = []  # what of the last step could not be
        self.folder = folders.unet_dir(run_dir, stage.number)
        self.inference = folders.inference_path(run_dir, stage.number)
        self.run_dir = run_dir
        self.pictures = prepared.source.fingerprint
        self.text_embed_dim = prepared.embeddings.dim
        self.encoder = encoder_fingerprint(encoder_folder(config.text_encoder))

    def is_finished(self) -> bool:
        """Whether the inference file of the last step is there; on rank 0."""
        if not self.inference.is_file():
            return False
        try:
            return inference.read_inference(self.inference).step >= self.steps
        except CheckpointError as error:
            self.say(f"written anew from the newest checkpoint: {error}")
            return False

    def resume(self, session: Session) -> None:
        """Loads the newest good checkpoint, whatever ranks and ZeRO stage it was saved with.

        The session then stands where the checkpoint does; without one nothing is changed.

        Raises:
            CheckpointError: If it is of another run, or all are damaged.
        """
        from_rank_0(lambda: checkpoint.clear_staging(self.folder))
        folder, manifest = from_rank_0(lambda: checkpoint.newest_good(self.folder, self.say))
        if folder is None:
            self._drop_snapshots_after(0)
            return
        _refuse_another_run(folder, manifest, self)
        self._tell_of_pictures(manifest)
        if self.stage.few_steps is None:
            self.origin_sha256 = manifest.get("origin")  # which need not be there any more
        optimizer = session.setup.optimizer
        together(lambda: load_shards(session.engine, session.averages, optimizer, folder))
        session.engine.publish()
        session.engine.load_loss_scale(manifest.get("loss_scale"))
        session.step = session.saved_step = self._good = manifest["step"]
        self.say(self._where(session.step))
        if session.step < self.steps:
            self._drop_snapshots_after(session.step)
        facts = _facts(session.setup)
        if changed := [f"{key} {manifest[key]} -> {facts[key]}" for key in facts
                       if manifest.get(key, facts[key]) != facts[key]]:  # fmt: skip
            self.say(f"saved with another setup: {', '.join(changed)}")

    def _drop_snapshots_after(self, step: int) -> None:
        """Deletes averages of steps that are about to be repeated, maybe otherwise."""

        def drop() -> None:
            for snapshot in list_snapshots(self.run_dir, self.stage.number):
                if snapshot.step > step:
                    snapshot.path.unlink(missing_ok=True)

        from_rank_0(drop)

    def _where(self, step: int) -> str:
        """Where a training goes on, or that there is nothing left."""
        if step < self.steps:
            return f"{self.stage.name}: continues at step {step} of {self.steps}"
        return (
            f"{self.stage.name}: its checkpoint is of step {step} and training.steps is "
            f"{self.steps}, so nothing is left to train; set training.steps above {step} to go on"
        )

    def save(self, session: Session) -> None:
        """Writes a checkpoint, or says why it could not; `session.saved_step` tells."""
        if self._try(session.step, "checkpoint", lambda: self._save(session)):
            session.saved_step = session.step

    def save_inference(self, session: Session) -> None:
        """Writes the EMA weights for sampling, or says why it could not."""
        self.save_average(session.ema, self.inference, session.step, "file for sampling")

    def save_snapshots(self, session: Session) -> None:
        """Writes the averages that others are made of, or says why it could not."""
        step = session.step
        for average in session.profiles:
            path = folders.snapshot_path(self.run_dir, self.stage.number, step, average.width)
            self.save_average(average, path, step, f"average of width {average.width:g}")

    def save_average(self, ema: Ema, path: Path, step: int, what: str) -> bool:
        """Writes an average of the weights, or says why it could not; whether it is there."""
        file = inference.InferenceFile(
            path, self.config, self.stage.number, self.text_embed_dim,
            self.encoder, step, self.steps, origin_sha256=self.origin_sha256,
        )  # fmt: skip
        if self._try(step, what, lambda: write_average(ema, file)):
            return True
        from_rank_0(lambda: _remove_if_empty(path.parent))
        return False

    def finish(self) -> None:
        """Ends a training all of whose steps are done.

        Raises:
            EnvironmentProblem: If something of the last step could not be saved.
        """
        if not self._unsaved:
            return
        if from_rank_0(self.is_finished):
            remedy = (
                f"{self.inference} holds the weights of the last step to sample from; a training "
                f"with more steps would continue from the newest checkpoint."
            )
        else:
            remedy = (
                "Free the disk, or lower training.keep_checkpoints, and run the same command "
                "again: it continues from the newest checkpoint."
            )
        raise EnvironmentProblem("\n".join([*self._unsaved, remedy]))

    def _tell_of_pictures(self, manifest: dict[str, Any]) -> None:
        if manifest["pictures"] != self.pictures:
            self.say(
                "the pictures changed since the checkpoint; training goes on with the new ones"
            )

    def _try(self, step: int, what: str, save: Callable[[], None]) -> bool:
        try:
            save()
        except DiskProblem as error:
            from_rank_0(lambda: checkpoint.clear_staging(self.folder))
            where = f"{self.stage.name}: no {what} saved at step {step} in {self.folder}: {error}"
            if step >= self.steps:
                self._unsaved.append(where)
            else:
                self.say(f"WARNING: {where}\nTraining goes on; it is tried again at its time.")
            return False
        return True

    def _save(self, session: Session) -> None:
        engine, averages, step = session.engine, session.averages, session.step
        # Without ZeRO every rank holds the same: one writes.
        writes = rank() == 0 or engine.zero_stage > 0
        needed = torch.tensor(state_bytes(engine, averages) if writes else 0, device=engine.device)
        come_to_exchange()
        torch.distributed.all_reduce(needed)
        from_rank_0(lambda: check_space(self.folder, int(needed)))
        staging = Path(from_rank_0(lambda: str(checkpoint.staging_folder(self.folder, step))))

        def write() -> None:
            if writes:
                save_shard(engine, averages, session.setup.optimizer, staging / file_name(rank()))

        together(write)
        facts = {
            "format": FORMAT,
            **_facts(session.setup),
            "loss_scale": engine.loss_scale_state(),
            "pictures": self.pictures,
            "text_encoder": self.encoder,
            "origin": self.origin_sha256,
        }
        from_rank_0(lambda: str(checkpoint.commit(staging, step, facts)))
        training = self.config.training
        from_rank_0(
            lambda: checkpoint.remove_old(
                self.folder, step, training.keep_checkpoints, training.keep_every, good=self._good
            )
        )
        self._good = step


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # which it is not
        folder.rmdir()


def write_average(ema: Ema, file: inference.InferenceFile) -> None:
    """Writes an inference file: all ranks gather, rank 0 writes."""
    weights = side_by_side(ema.named_weights())
    failure: Exception | None = None
    if rank() == 0:
        try:
            inference.stream_inference(file, ema.shapes(), weights)
        except Exception as error:  # the other ranks are still giving their shares
            failure = error
    for _ in weights:
        pass

    def fail_together() -> None:
        if failure is not None:
            raise failure

    from_rank_0(fail_together)


def _refuse_another_run(folder: Path, manifest: dict[str, Any], saver: Saver) -> None:
    """Refuses a checkpoint that another run left, or one with another encoder or teacher.

    Raises:
        CheckpointError: Saying which.
    """
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: format {manifest.get('format')!r}, but this version reads {FORMAT!r}. "
            f"Continue it with the version that wrote it, or start anew with --fresh."
        )
    if manifest["text_encoder"] != saver.encoder:
        raise CheckpointError(
            f"{folder}: trained with another version of the text encoder "
            f"{saver.config.text_encoder!r}. Put the original files back, or start anew with "
            f"--fresh."
        )
    if (few := saver.stage.few_steps) and manifest.get("origin") != saver.origin_sha256:
        raise CheckpointError(
            f"{folder}: {saver.stage.name} learned from a teacher in {few.teacher} that changed "
            f"since. Put its file for sampling back, or start anew with --fresh."
        )


def _facts(setup: Setup) -> dict[str, Any]:
    """How the state is divided: told when it changes."""
    return {
        "processes": world_size(),
        "zero_stage": setup.zero_stage,
        "optimizer": setup.optimizer,
        "precision": setup.precision,
    }


def check_space(folder: Path, needed: int) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
        DiskProblem: With the path, what is needed and what is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskProblem(
            f"{folder}: a checkpoint takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free. "
            f"Free some, lower training.keep_checkpoints, or move the run to another disk."
        )
