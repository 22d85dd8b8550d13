"""A run's data, checked, resized and encoded."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from imagen_scale.config import Config
from imagen_scale.data.embeddings import EmbeddingStore
from imagen_scale.data.image_store import ImageStore, stored_sizes
from imagen_scale.data.sources.opening import Source
from imagen_scale.data.sources.screening import usable_source
from imagen_scale.data.storage import Progress
from imagen_scale.errors import DataError
from imagen_scale.files.caches import cache_root, expanded
from imagen_scale.files.pictures import from_uint8


class Prepared(NamedTuple):
    """Everything that training reads, ready on disk."""

    source: Source
    images: dict[int, ImageStore]  # by size in pixels
    embeddings: EmbeddingStore
    report: Path  # data_report.json: which pictures were left out, and why


def cache_dir(config: Config) -> Path:
    """Folder of prepared data: `data.cache_dir`, or `cache_root`.

    Raises:
        DataError: If it is in a home that is not there.
    """
    named = config.data.cache_dir
    if named is None:
        return cache_root()
    folder = expanded(named)
    if str(folder).startswith("~"):
        raise DataError(
            f"data.cache_dir: {named!r}: there is no home {folder.parts[0]} here; name a folder "
            f"(./{folder} is one beside you)."
        )
    return folder


def prepare(
    config: Config, progress: Progress | None = None, only: Collection[int] | None = None
) -> Prepared:
    """Opens pictures and text, preparing on disk what is not there yet.

    Every rank may call it at once: one does the work, the others wait for it.

    Args:
        config: The run.
        progress: Called as the work goes on.
        only: Sizes of the pictures to prepare; default: those of every stage.

    Raises:
        DataError: If the text encoder, or too many of the pictures, are not usable.
        EnvironmentProblem: If the cache folder cannot be written.
        MissingExtraError: If a package is missing.
    """
    folder = cache_dir(config)
    source, report = usable_source(config.data, folder / "images", progress)
    images: dict[int, ImageStore] = {}
    sizes, max_bytes = config.imagen.image_sizes, round(config.data.cache_images_gb * 1e9)
    stored = stored_sizes(sizes, len(source), max_bytes)  # of all, whichever are opened now
    for stage_size in sizes if only is None else only:
        images[stage_size] = ImageStore.open(
            source, stage_size, folder, stored=stage_size in stored, progress=progress
        )
    # The prompts drawn while training too: the encoder is not to be loaded again beside a U-Net.
    captions = [*source.captions, *config.training.sample_prompts]
    embeddings = EmbeddingStore.open(config.text, config.text_encoder, captions, folder, progress)
    return Prepared(source, images, embeddings, report)


def real_pictures(prepared: Prepared, indices: Sequence[int], size: int) -> Tensor:
    """Pictures of the data set, (N, 3, size, size) in [-1, 1]."""
    pictures = [torch.from_numpy(prepared.images[size][i].copy()) for i in indices]
    return from_uint8(torch.stack(pictures))
