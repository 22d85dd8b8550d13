"""A short endless sequence of grey pictures, and its batches."""

import multiprocessing
import time

import numpy as np

from imagen_scale.data.loading import batches
from imagen_scale.data.sequence import CaptionedImages

COUNT, SIZE = 10, 4


class Pictures:
    """Picture i is grey level i, brighter by 100 in its right half."""

    trouble = None

    def __getitem__(self, i):
        if self.trouble:
            raise self.trouble("a.png: the picture cannot be read: it is gone; repair it.")
        picture = np.full((3, SIZE, SIZE), i, np.uint8)
        picture[:, :, SIZE // 2 :] += 100
        return picture


CAPTIONS = [f"number {i}" for i in range(COUNT)]


class Embeddings(dict):
    """Encoded captions, kept in float16."""

    def stored(self, caption):
        return self[caption]


EMBEDDINGS = Embeddings(
    {caption: np.full((i + 1, 2), i, np.float16) for i, caption in enumerate(CAPTIONS)}
)


def sequence(indices=range(COUNT), *, seed=0, flip=False, max_text_len=256, shuffle=True):
    return CaptionedImages(
        Pictures(), CAPTIONS, EMBEDDINGS, list(indices),
        seed=seed, flip=flip, max_text_len=max_text_len, shuffle=shuffle,
    )  # fmt: skip


def loaded(dataset=None, *, start_step=0, steps=3, global_batch=12, micro_batch=3, rank=0,
           world_size=1, num_workers=0):  # fmt: skip
    return batches(
        dataset or sequence(flip=True), start_step=start_step, steps=steps,
        global_batch=global_batch, micro_batch=micro_batch, rank=rank, world_size=world_size,
        num_workers=num_workers,
    )  # fmt: skip


class Stuck:
    """Pictures that never come."""

    def __init__(self):
        self.is_asked = multiprocessing.Event()

    def __getitem__(self, i):
        self.is_asked.set()
        time.sleep(3600)
