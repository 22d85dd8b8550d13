"""The pictures and captions that quality.py's peers train on: those that our trainer would see."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from imagen_scale.config import Config, StageConfig
from imagen_scale.data.loading import batches
from imagen_scale.data.prepared import Prepared
from imagen_scale.files.pictures import from_uint8
from imagen_scale.training.samples import split_samples


class Step(NamedTuple):
    """What one step of training sees."""

    images: Tensor  # (B, 3, size, size) in [0, 1], as the peers take them
    text_embeds: Tensor  # (B, L, D) float32
    text_mask: Tensor  # (B, L) bool


def steps(config: Config, stage: StageConfig, prepared: Prepared) -> Iterator[Step]:
    """A U-Net's training, step by step."""
    for batch in batches(
        split_samples(config, stage, prepared).train, start_step=0, steps=stage.steps,
        global_batch=stage.global_batch, micro_batch=stage.global_batch, rank=0, world_size=1,
        num_workers=0,
    ):  # fmt: skip
        images = batch.images
        images = from_uint8(images) if images.dtype == torch.uint8 else images.float()
        yield Step((images + 1) / 2, batch.text_embeds.float(), batch.text_mask)
