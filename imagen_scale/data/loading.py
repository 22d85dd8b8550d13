"""Batches of a sequence, loaded by processes of their own where that is asked for."""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from traceback import clear_frames

import torch
from torch.utils.data import DataLoader

from imagen_scale.data.sequence import Batch, CaptionedImages
from imagen_scale.errors import ConfigError, DataError, EnvironmentProblem
from imagen_scale.files.pinning import can_pin


class _PositionBatches:
    """Positions of each micro-batch of one rank, in order; a batch sampler for `DataLoader`."""

    def __init__(
        self, steps: range, global_batch: int, micro_batch: int, rank: int, world: int
    ) -> None:
        self._steps = steps
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._rank = rank
        self._world = world

    def __iter__(self) -> Iterator[list[int]]:
        stride = self._micro_batch * self._world  # what all ranks take in one micro-step
        for step in self._steps:
            for offset in range(0, self._global_batch, stride):
                start = step * self._global_batch + offset + self._rank * self._micro_batch
                yield list(range(start, start + self._micro_batch))


MOST_PROCESSES = 4


def loader_processes(written: int | None, *, are_stored: bool, cores: int) -> int:
    """How many processes load for each rank.

    Args:
        written: `data.num_workers`.
        are_stored: Whether resized pictures lie ready; copying them out of a memory map takes less
            than sending them from one process to another.
        cores: Those of each rank; one is the rank's own.
    """
    if written is not None:
        return written
    if are_stored or not torch.cuda.is_available():  # without a card it has the cores to itself
        return 0
    return max(1, min(MOST_PROCESSES, cores - 1))


def batches(
    dataset: CaptionedImages,
    *,
    start_step: int,
    steps: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    num_workers: int,
) -> Iterator[Batch]:
    """Yields this rank's micro-batches.

    Optimizer step s covers positions [s * global_batch, (s + 1) * global_batch); of these,
    micro-step a of rank r takes `micro_batch` from s * global_batch +
    (a * world_size + r) * micro_batch on. The samples of a step are thus the same however many
    ranks share them.

    Args:
        dataset: The sequence.
        start_step: First optimizer step.
        steps: Number of optimizer steps.
        global_batch: Samples per optimizer step over all ranks.
        micro_batch: Samples per rank and micro-step.
        rank: This rank, from 0.
        world_size: Number of ranks.
        num_workers: Loader processes; 0 loads in this one. They live until the last batch.

    Raises:
        ConfigError: If the ranks cannot share the global batch evenly.
        DataError: If a picture that is decoded at every read was damaged since it was checked.
        EnvironmentProblem: If the disk cannot be read.
    """
    if global_batch % (micro_batch * world_size):
        raise ConfigError(
            f"training.global_batch: {global_batch} is not a multiple of micro_batch "
            f"{micro_batch} x {world_size} ranks; change one of them."
        )
    loader = DataLoader(
        dataset,
        batch_sampler=_PositionBatches(
            range(start_step, start_step + steps), global_batch, micro_batch, rank, world_size
        ),
        collate_fn=dataset.collate,
        num_workers=num_workers,
        pin_memory=can_pin(),
        # The loader draws a seed for its workers; from the global generator it would change the
        # noise of a resumed run.
        generator=torch.Generator(),
        worker_init_fn=_ignore_signals,
    )
    # Held back until the workers ignore them: one that is just starting would die of them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    others = set(multiprocessing.active_children())
    try:
        loaded = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # At exit Python ends its daemons with the very signal they ignore, then waits for them for
    # ever. With a priority this runs before that.
    workers = set(multiprocessing.active_children()) - others
    Finalize(None, _kill, args=(workers,), exitpriority=0)
    return _plain_errors(loaded)


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


def _ignore_signals(worker: int) -> None:
    """Being told to stop is the trainer's affair: it needs its workers to the step's end."""
    for signum in _STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def _kill(workers: Iterable[BaseProcess]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would complain of each
    for worker in workers:
        worker.kill()
        worker.join()


def _plain_errors(loaded: Iterator[Batch]) -> Iterator[Batch]:
    """Takes the worker's traceback, which `DataLoader` puts into the message, out again."""
    try:
        yield from loaded
    except (DataError, EnvironmentProblem) as error:
        kind = type(error)
        # The error and the loader's frames hold each other, and a loader that is collected as part
        # of a cycle has lost the queue through which it tells its workers to end.
        clear_frames(error.__traceback__)
        del loaded
        raise kind(str(error).rpartition(f"{kind.__name__}: ")[2].strip()) from error
