"""Which picture comes when: an endless shuffled sequence that depends on the seed alone."""

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from traceback import clear_frames
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from imagen_scale.config import Config
from imagen_scale.data.image_store import ImageStore
from imagen_scale.data.images import Picture
from imagen_scale.data.screening import usable_source
from imagen_scale.data.sources import Source
from imagen_scale.data.storage import Progress
from imagen_scale.data.text import Embedding, EmbeddingStore, pad_embeddings
from imagen_scale.errors import ConfigError, DataError, EnvironmentProblem


class Sample(NamedTuple):
    """One picture with its caption."""

    image: Picture  # (3, H, W) uint8
    text_embeds: Embedding  # (L, D)
    position: int
    caption: str


class Batch(NamedTuple):
    """One micro-batch of B samples."""

    images: Tensor  # (B, 3, H, W) float32 in [-1, 1]
    text_embeds: Tensor  # (B, L, D) float32, zero where masked
    text_mask: Tensor  # (B, L) bool, true on tokens
    positions: Tensor  # (B,) int64, place of each sample in the endless sequence
    captions: list[str]


class Prepared(NamedTuple):
    """Everything that training reads, ready on disk."""

    source: Source
    images: dict[int, ImageStore]  # by size in pixels
    embeddings: EmbeddingStore
    report: Path  # data_report.json: which pictures were left out, and why


def seeded(*parts: int | str) -> int:
    """A number in [0, 2**63) that looks random but depends on `parts` alone."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def split_indices(keys: list[str], val_fraction: float) -> tuple[list[int], list[int]]:
    """Splits pictures into those to train on and those held out.

    A picture's side depends on its own key only, so adding or removing others never moves it from
    one side to the other.

    Args:
        keys: The source's keys.
        val_fraction: Share to hold out, in [0, 1); met on average.

    Returns:
        Indices to train on and indices held out, each increasing.
    """
    train: list[int] = []
    val: list[int] = []
    for i, key in enumerate(keys):
        held_out = seeded("split", key) < val_fraction * 2**63
        (val if held_out else train).append(i)
    return train, val


class CaptionedImages(Dataset[Sample]):
    """The endless sequence: position g is place g % N of epoch g // N.

    What stands at a position is a pure function of seed and position. Nothing about the order of
    the data needs saving: a run that resumes at any step goes on exactly.
    """

    def __init__(
        self,
        images: ImageStore,
        captions: list[str],
        embeddings: EmbeddingStore,
        indices: list[int],
        *,
        seed: int,
        flip: bool,
        max_text_len: int,
        shuffle: bool = True,
    ) -> None:
        """Joins pictures and text.

        Args:
            images: Pictures of the whole source.
            captions: Captions of the whole source.
            embeddings: Holds all of these captions.
            indices: The N pictures that take part; see `split_indices`.
            seed: Of the order and of the mirroring.
            flip: Whether half of the samples are mirrored left to right.
            max_text_len: Tokens kept at most.
            shuffle: Whether each epoch has an order of its own; else `indices` as given.

        Raises:
            DataError: If `indices` is empty.
        """
        if not indices:
            raise DataError(
                f"data.val_fraction: of {len(captions)} pictures none falls into this part of the "
                f"split; change the share or add pictures."
            )
        self._images = images
        self._captions = captions
        self._embeddings = embeddings
        self._indices = indices
        self._seed = seed
        self._flip = flip
        self._max_text_len = max_text_len
        self._shuffle = shuffle
        self._epoch = -1  # whose order is kept, because positions are asked for mostly in order
        self._order: npt.NDArray[np.int64] = np.arange(0)

    def __len__(self) -> int:
        """Number of pictures in one epoch."""
        return len(self._indices)

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position, which may be as large as one likes."""
        i = self.picture(position)
        image = self._images[i]
        if self._flip and seeded("flip", self._seed, position) % 2:
            image = image[:, :, ::-1]
        caption = self._captions[i]
        return Sample(image, self._embeddings[caption], position, caption)

    def picture(self, position: int) -> int:
        """Which picture of the source stands at a position."""
        epoch, place = divmod(position, len(self._indices))
        return self._indices[self._epoch_order(epoch)[place]]

    def collate(self, samples: list[Sample]) -> Batch:
        """Stacks samples; pictures become float32 in [-1, 1]."""
        images = torch.from_numpy(np.stack([sample.image for sample in samples]))
        embeds = [sample.text_embeds for sample in samples]
        text_embeds, text_mask = pad_embeddings(embeds, self._max_text_len)
        return Batch(
            images.float() / 127.5 - 1,
            text_embeds,
            text_mask,
            torch.tensor([sample.position for sample in samples]),
            [sample.caption for sample in samples],
        )

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            count = len(self._indices)
            order = _permutation(count, self._seed, epoch) if self._shuffle else np.arange(count)
            self._epoch, self._order = epoch, order
        return self._order


def _permutation(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    high, low = divmod(seeded("epoch", seed, epoch), 2**32)
    # NumPy's legacy generator on purpose: its stream is frozen (NEP 19), so an upgrade of NumPy
    # between two parts of a run does not change the order.
    return np.random.RandomState([high, low]).permutation(count)


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
        pin_memory=torch.cuda.is_available(),
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


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


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


def cache_dir(config: Config) -> Path:
    """Folder of prepared data: `data.cache_dir`, $IMAGEN_SCALE_CACHE or ~/.cache/imagen-scale."""
    folder = config.data.cache_dir or os.environ.get("IMAGEN_SCALE_CACHE")
    return Path(folder or "~/.cache/imagen-scale").expanduser()


def prepare(config: Config, progress: Progress | None = None, size: int | None = None) -> Prepared:
    """Opens pictures and text, preparing on disk what is not there yet.

    Every rank may call it at once: one does the work, the others wait for it.

    Args:
        config: The run.
        progress: Called as the work goes on.
        size: Prepare pictures of this size only; default: those of every stage.

    Raises:
        DataError: If the text encoder, or too many of the pictures, are not usable.
        EnvironmentProblem: If the cache folder cannot be written.
        MissingExtraError: If a package is missing.
    """
    folder = cache_dir(config)
    source, report = usable_source(config.data, folder / "images", progress)
    images: dict[int, ImageStore] = {}
    # One limit for all sizes, given to the small ones first, whichever are opened now.
    bytes_left = round(config.data.cache_images_gb * 1e9)
    for stage_size in config.imagen.image_sizes:
        if size in (None, stage_size):
            images[stage_size] = ImageStore.open(source, stage_size, folder, bytes_left, progress)
        num_bytes = len(source) * 3 * stage_size**2
        if num_bytes <= bytes_left:
            bytes_left -= num_bytes
    # The prompts drawn while training too: the encoder is not to be loaded again beside a U-Net.
    captions = [*source.captions, *config.training.sample_prompts]
    embeddings = EmbeddingStore.open(config.text, config.text_encoder, captions, folder, progress)
    return Prepared(source, images, embeddings, report)


def real_pictures(prepared: Prepared, indices: Sequence[int], size: int) -> Tensor:
    """Pictures of the data set, (N, 3, size, size) in [-1, 1]."""
    pictures = [torch.from_numpy(prepared.images[size][i].copy()) for i in indices]
    return torch.stack(pictures).float() / 127.5 - 1
