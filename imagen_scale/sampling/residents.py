"""Stages that stay loaded for the next pictures, as far as memory allows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch

from imagen_scale.data.encoder import TextEncoder
from imagen_scale.models.host import host_memory
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.prompts import open_encoder
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stage import Stage

# What a stage is taken to need until it was seen: its weights, as much again while they are read,
# and what it computes.
WEIGHTS_TIMES = 3


class Key(NamedTuple):
    """What a loaded stage can be used for again."""

    file: str
    version: tuple[int, int]  # of the file: bytes, and when it was written; training writes it anew
    runtime: RuntimeOptions
    tile: int | None
    caches: bool

    @classmethod
    def of(
        cls, file: InferenceFile, runtime: RuntimeOptions, tile: int | None, *, caches: bool = False
    ) -> "Key":
        """Of a stage opened now."""
        found = file.path.stat()
        version = (found.st_size, found.st_mtime_ns)
        return cls(str(file.path), version, runtime, tile, caches)


class Residents:
    """Holds loaded stages, one of each inference file, and the text encoder.

    They are lent to one user at a time, not to several threads at once. A stage stays after its use
    if what the others were seen to need still fits beside it; else it is freed before the next is
    loaded, as if nothing was held. What is full in spite of that makes room by freeing all others.

    Args:
        device: Where the stages are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Where memory runs out a network steps down to slower ways: on a card nothing is held
        # beside a stage until it was seen what it takes.
        self.is_scarce = device.type == "cuda"
        self._held: dict[str, tuple[Key, Stage]] = {}
        self._needs: dict[str, int] = {}  # most bytes seen in use, by file
        self._encoder: tuple[tuple[str, str], TextEncoder] | None = None

    def __len__(self) -> int:
        """How many stages are loaded."""
        return len(self._held)

    @contextmanager
    def lend(
        self, key: Key, load: Callable[[], Stage], others: Sequence[InferenceFile]
    ) -> Iterator[Stage]:
        """A stage to use; afterwards it stays, or is freed.

        Args:
            key: What it is.
            load: Loads it, where it is not held already.
            others: Every stage of the cascade, of which the next one will be wanted.
        """
        before = self._begin()
        stage = self._take(key, load, others)
        try:
            yield stage
        except torch.OutOfMemoryError:
            self._free(key.file)
            raise
        finally:
            self._needs[key.file] = max(self._needs.get(key.file, 0), self._taken_since(before))
            if free_bytes(self.device) < self._wanted(others):
                self._free(key.file)

    @contextmanager
    def lend_encoder(
        self, file: InferenceFile, device: torch.device | None, others: Sequence[InferenceFile]
    ) -> Iterator[TextEncoder]:
        """The text encoder of a run; afterwards it stays, or is freed.

        Args:
            file: Of a stage that it was trained with.
            device: Where it computes.
            others: Every stage of the cascade.
        """
        key = (file.text_fingerprint, str(device))
        if self._encoder is None or self._encoder[0] != key:
            self._free_encoder()
            self._encoder = key, open_encoder(file, device)
        yield self._encoder[1]
        if free_bytes(self.device) < self._wanted(others):
            self._free_encoder()

    def make_room(self) -> bool:
        """Frees all; whether there was anything."""
        held = list(self._held)
        for file in held:
            self._free(file)
        return self._free_encoder() or bool(held)

    def close(self) -> None:
        """Frees all."""
        self.make_room()

    def _take(self, key: Key, load: Callable[[], Stage], others: Sequence[InferenceFile]) -> Stage:
        if key.file in self._held:
            held, stage = self._held[key.file]
            if held == key:
                return stage
            self._free(key.file)
        need = max(self._need(file) for file in others if str(file.path) == key.file)
        is_unknown = self.is_scarce and key.file not in self._needs
        if is_unknown or free_bytes(self.device) < need:
            self.make_room()
        try:
            stage = load()
        except torch.OutOfMemoryError:
            if not self.make_room():
                raise
            stage = load()
        self._held[key.file] = key, stage
        return stage

    def _need(self, file: InferenceFile) -> int:
        path = str(file.path)
        if path in self._needs:
            return self._needs[path]
        with suppress(OSError):
            return WEIGHTS_TIMES * file.path.stat().st_size
        return 0

    def _wanted(self, files: Sequence[InferenceFile]) -> int:
        """Bytes for the largest stage that is not held."""
        return max((self._need(f) for f in files if str(f.path) not in self._held), default=0)

    def _free_encoder(self) -> bool:
        if self._encoder is None:
            return False
        _, encoder = self._encoder
        self._encoder = None
        encoder.close()
        return True

    def _free(self, file: str) -> None:
        if file in self._held:
            _, stage = self._held.pop(file)
            stage.close()

    def _begin(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        return free_bytes(self.device)

    def _taken_since(self, before: int) -> int:
        """Bytes that were taken at most; of the host, that are taken now."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - before
        return before - free_bytes(self.device)


def free_bytes(device: torch.device) -> int:
    """Memory that may still be taken: of the card, what torch holds in reserve included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return host_memory().available
