"""What stays the same through every attempt at training one U-Net."""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from imagen_scale.config import Config
from imagen_scale.data.loading import loader_processes
from imagen_scale.data.prepared import Prepared
from imagen_scale.data.split import split
from imagen_scale.planning.machine import joined, this_machine
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import is_finished, read_inference
from imagen_scale.training.link import link_bytes_per_s
from imagen_scale.training.lowres_samples import (
    Drawn,
    draw_samples,
    draws_from_between,
    read_samples,
)
from imagen_scale.training.origin import Origin
from imagen_scale.training.preemption import StopRequest
from imagen_scale.training.ranks import from_all, from_rank_0, told_by_rank_0, world_size
from imagen_scale.training.samples import split_samples
from imagen_scale.training.saving import Saver
from imagen_scale.training.threads import cores_each, ranks_here
from imagen_scale.training.watchdog import Watchdog

if TYPE_CHECKING:
    from imagen_scale.training.loop import Due


class Job:
    """The training of one U-Net in a run.

    Args:
        config: The run.
        unet_number: From 1.
        run_dir: The run's folder.
        prepared: What is trained on.
        say: Told of what happens; on rank 0.
        request: Whether somebody asked to stop.
        watchdog: Told what this rank does.
        plan_check: Compare predicted with measured memory after so many steps.
        origin: What it starts from; None for random weights.

    Attributes:
        stage: The U-Net.
        machine: What all ranks may count on: made by all of them together, before anything is on
            the cards.
        samples: Those of `prepared` that it is trained and validated on.
        num_workers: Processes that load them for each rank.
        saver: Its checkpoints and its file for sampling.
        owed: A step after which memory ran out, and what is still due after it; else None.
    """

    def __init__(
        self,
        config: Config,
        unet_number: int,
        run_dir: Path,
        prepared: Prepared,
        *,
        say: Callable[[str], None],
        request: StopRequest,
        watchdog: Watchdog,
        plan_check: int | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.config, self.run_dir, self.prepared = config, run_dir, prepared
        self.say, self.request, self.watchdog = say, request, watchdog
        self.plan_check, self.origin = plan_check, origin
        here = this_machine(world_size())._replace(link=link_bytes_per_s())
        self.machine = joined(from_all((platform.node(), here)))
        # The learned null embedding of every caption is as wide as the encoder's features.
        self.stage = config.stage(unet_number, prepared.embeddings.dim)
        self.saver = Saver(config, self.stage, run_dir, prepared, say, origin=origin)
        self.samples = split_samples(config, self.stage, prepared, self._drawn_before())
        self.num_workers = loader_processes(
            config.data.num_workers,
            are_stored=prepared.images[self.stage.size].file is not None
            and config.data.fit != "random_crop",
            cores=cores_each(ranks_here()),
        )
        self.owed: tuple[int, Due] | None = None

    def _drawn_before(self) -> Drawn | None:
        """Pictures as the stage before draws them, made now if they are needed and not there."""
        if self.stage.small_size is None or not self.stage.training.lowres_samples:
            return None
        # Silently: what is wrong with the file is told where training begins.
        if from_rank_0(lambda: is_finished(self.saver.inference, self.stage.steps)):
            return None
        before = self.stage.number - 1
        path = inference_path(self.run_dir, before)
        # Another machine may not see yet what rank 0 has just written.
        if not from_rank_0(lambda: draws_from_between(read_inference(path))):
            self.say(
                f"{self.stage.name}: training.lowres_samples is left out: every step of U-Net "
                f"{before} starts where next to nothing is left of a picture, so that what it "
                f"draws fits none"
            )
            return None
        with self.watchdog.phase("drawing pictures"):
            train, _ = split(self.config.data, self.prepared.source)
            told_by_rank_0(
                lambda: draw_samples(self.stage, self.run_dir, self.prepared, train, self.say)
            )
        return read_samples(self.stage, self.run_dir)
