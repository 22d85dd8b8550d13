"""Encoded captions in a memory-mapped store."""

import json
import uuid
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagen_scale.config.sections import TextConfig
from imagen_scale.data.encoder import (
    Embedding,
    TextEncoder,
    encoder_dim,
    encoder_fingerprint,
    encoder_folder,
)
from imagen_scale.data.storage import Progress, exclusive, written_whole
from imagen_scale.errors import DataError
from imagen_scale.files.kept import read_kept

StoredEmbedding: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.float16]  # (L, D)
SHARD_CAPTIONS = 4096  # at most this much encoding is lost when a build is killed


class _Index(NamedTuple):
    captions: list[str]
    offsets: list[int]  # the row at which each begins, and the end of the last

    def fits(self, shape: tuple[int, ...], dim: int) -> bool:
        """Whether the shard of it may have this shape."""
        in_order = self.offsets == sorted(self.offsets) and self.offsets[:1] == [0]
        is_whole = len(self.offsets) == len(self.captions) + 1
        return is_whole and in_order and shape == (self.offsets[-1], dim)


class EmbeddingStore:
    """Encoded captions on disk: `store[caption]` is (L, D) float32.

    A folder per encoder and dtype holds shards that are only ever added: `shard_<n>_<writer>.npy`
    (sum of L, D), then the same with `.json`: the captions and the row at which each begins. The
    second appears last and by renaming, so it marks the shard as whole: a build that is killed
    loses nothing that was there before.
    """

    def __init__(self, folder: Path, dim: int) -> None:
        """Use `EmbeddingStore.open`."""
        self.dim = dim
        self._folder = folder
        self._rows: dict[str, tuple[str, int, int]] = {}  # caption: shard, first row, end
        self._shards: dict[str, npt.NDArray[Any]] = {}
        self._read_shards()

    @classmethod
    def open(
        cls,
        config_text: TextConfig,
        encoder_name: str,
        captions: list[str],
        cache_dir: Path,
        progress: Progress | None = None,
    ) -> "EmbeddingStore":
        """Opens the store of an encoder, first encoding those of `captions` that it lacks.

        Args:
            config_text: Dtype of the store and batch size of the encoder.
            encoder_name: As in `encoder_folder`.
            captions: What must be in the store; may repeat.
            cache_dir: The store is `cache_dir/text/<fingerprint>-<dtype>`.
            progress: Called as captions are encoded.

        Raises:
            DataError: If the encoder is not available or its values overflow the dtype.
            EnvironmentProblem: If the store cannot be written.
            MissingExtraError: If a package is missing.
        """
        encoder = encoder_folder(encoder_name)
        name = f"{encoder_fingerprint(encoder)}-{config_text.store_dtype}"
        store = cls(cache_dir / "text" / name, encoder_dim(encoder_name))
        if store._missing(captions):
            with exclusive(store._folder / "store.lock"):
                store._read_shards()  # another process may have encoded them meanwhile
                if missing := store._missing(captions):
                    store._encode(encoder, missing, config_text, progress)
        return store

    def __contains__(self, caption: object) -> bool:
        return caption in self._rows

    def __getitem__(self, caption: str) -> Embedding:
        """Features of a caption's tokens, (L, D) float32; KeyError if it was never encoded."""
        return self.stored(caption).astype(np.float32)

    def stored(self, caption: str) -> StoredEmbedding:
        """The same in `text.store_dtype`, half as many bytes to move with float16."""
        shard, start, end = self._rows[caption]
        if shard not in self._shards:
            self._shards[shard] = np.load(self._folder / f"{shard}.npy", mmap_mode="r")
        return np.array(self._shards[shard][start:end])

    def num_tokens(self, caption: str) -> int:
        """Length L of a caption's features; KeyError if it was never encoded."""
        _, start, end = self._rows[caption]
        return end - start

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as a full copy; each process opens its own.
        return {**self.__dict__, "_shards": {}}

    def _missing(self, captions: list[str]) -> list[str]:
        return [caption for caption in dict.fromkeys(captions) if caption not in self._rows]

    def _read_shards(self) -> None:
        for file in sorted(self._folder.glob("shard_*.json"), key=_shard_number):
            try:
                shape = np.load(file.with_suffix(".npy"), mmap_mode="r").shape
            except (OSError, ValueError):  # damaged from outside: its captions are encoded again
                continue
            index = read_kept(file, _Index)
            if index is not None and index.fits(shape, self.dim):
                spans = pairwise(index.offsets)
                for caption, (start, end) in zip(index.captions, spans, strict=True):
                    self._rows[caption] = (file.stem, start, end)

    def _encode(
        self, encoder: Path, captions: list[str], config: TextConfig, progress: Progress | None
    ) -> None:
        """Encodes and stores `captions`, shard by shard; the caller holds the lock."""
        model = TextEncoder(encoder)
        number = 1 + max(map(_shard_number, self._folder.glob("shard_*.json")), default=-1)
        done = 0
        for some in _slices(captions, SHARD_CAPTIONS):
            embeds: dict[str, npt.NDArray[Any]] = {}
            # Of similar length together, so that little padding is computed.
            for batch in _slices(sorted(some, key=len), config.batch_size):
                for caption, embed in zip(batch, model.encode(batch), strict=True):
                    embeds[caption] = _to_dtype(embed, config.store_dtype, caption)
                done += len(batch)
                if progress:
                    progress("encoding captions", done, len(captions))
            # Named after its writer, too: where locks do not reach other machines, rows of one
            # would else stand beside captions of another.
            name = f"shard_{number}_{uuid.uuid4().hex[:8]}"
            self._add_shard(self._folder / name, embeds)
            number += 1
        model.close()
        self._read_shards()

    def _add_shard(self, path: Path, embeds: dict[str, npt.NDArray[Any]]) -> None:
        offsets = np.cumsum([0, *(len(embed) for embed in embeds.values())]).tolist()
        with written_whole(path.with_suffix(".npy")) as file:
            np.save(file, np.concatenate(list(embeds.values())))
        with written_whole(path.with_suffix(".json")) as file:  # commits the shard
            file.write(json.dumps({"captions": list(embeds), "offsets": offsets}).encode())


def _shard_number(file: Path) -> int:
    return int(file.stem.split("_")[1])


def _slices(items: list[str], length: int) -> Iterator[list[str]]:
    for start in range(0, len(items), length):
        yield items[start : start + length]


def _to_dtype(embed: Embedding, dtype: str, caption: str) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):  # looked at below
        stored = embed.astype(dtype)
    if not np.isfinite(stored).all():
        raise DataError(
            f"text.store_dtype: the encoder's values for {caption!r} do not fit in {dtype}; set "
            f"it to 'float32', or choose another text.encoder."
        )
    return stored


def pad_embeddings(embeds: Sequence[StoredEmbedding], max_len: int) -> tuple[Tensor, Tensor]:
    """Stacks token features of unequal length, cutting text and mask together.

    Args:
        embeds: For each of B captions (L_i, D), all of one type.
        max_len: Tokens kept at most.

    Returns:
        Features (B, L, D) of that type, zero beyond a caption's end, and mask (B, L) bool, true on
        its tokens; L is the longest caption's length after cutting.
    """
    cut = [embed[:max_len] for embed in embeds]
    longest = max(len(embed) for embed in cut)
    dtype = torch.from_numpy(cut[0]).dtype
    text_embeds = torch.zeros(len(cut), longest, cut[0].shape[1], dtype=dtype)
    text_mask = torch.zeros(len(cut), longest, dtype=torch.bool)
    for i, embed in enumerate(cut):
        text_embeds[i, : len(embed)] = torch.from_numpy(embed)
        text_mask[i, : len(embed)] = True
    return text_embeds, text_mask
