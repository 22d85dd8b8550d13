"""Which picture comes when: an endless shuffled sequence that depends on the seed alone."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from imagen_scale.data.embeddings import EmbeddingStore, StoredEmbedding, pad_embeddings
from imagen_scale.data.image_store import ImageStore
from imagen_scale.data.lowres_inputs import LowresInputs
from imagen_scale.data.seeds import seeded
from imagen_scale.data.sources.images import PixelArray
from imagen_scale.errors import DataError


class TrainingSample(NamedTuple):
    """One picture with its caption."""

    image: PixelArray  # (3, H, W) uint8
    text_embeds: StoredEmbedding
    position: int
    caption: str
    # What stands for the picture made small, (3, h, h) uint8; None where nothing does.
    lowres: PixelArray | None = None


class Batch(NamedTuple):
    """One micro-batch of B samples, as small as it is stored: the device makes floats of it."""

    images: Tensor  # (B, 3, H, W) uint8; float32 in [-1, 1] is as good
    text_embeds: Tensor  # (B, L, D) float16 or float32, zero where masked
    text_mask: Tensor  # (B, L) bool, true on tokens
    positions: Tensor  # (B,) int64, place of each sample in the endless sequence
    captions: list[str]
    # Where some samples have another low-resolution picture than their own picture made small:
    lowres: Tensor | None = None  # these, (B, 3, h, h) uint8, anything for the others
    has_lowres: Tensor | None = None  # which have one, (B,) bool


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


class CaptionedImages(Dataset[TrainingSample]):
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
        random_crop: bool = False,
        lowres: LowresInputs | None = None,
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
            random_crop: Whether each sample is another part of its picture (see `data.fit`);
                `images` has to be one of `ImageStore.decoding`.
            shuffle: Whether each epoch has an order of its own; else `indices` as given.
            lowres: Other low-resolution pictures, for super-resolution; None has none.

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
        self._random_crop = random_crop
        self._lowres = lowres
        self._epoch = -1  # whose order is kept, because positions are asked for mostly in order
        self._order: npt.NDArray[np.int64] = np.arange(0)

    def __len__(self) -> int:
        """Number of pictures in one epoch."""
        return len(self._indices)

    def __getitem__(self, position: int) -> TrainingSample:
        """The sample at a position, which may be as large as one likes."""
        i = self.picture(position)
        if self._random_crop:
            # Of the highest 53 bits, which a float holds: below 1 whatever is drawn.
            place = (seeded("crop", self._seed, position) >> 10) / 2**53
            image = self._images.cropped(i, place)
        else:
            image = self._images[i]
        is_mirrored = self._flip and seeded("flip", self._seed, position) % 2 == 1
        if is_mirrored:
            image = image[:, :, ::-1]
        caption, lowres = self._captions[i], None
        if self._lowres is not None:
            lowres = self._lowres.of(i, image, position, is_mirrored=is_mirrored)
        return TrainingSample(image, self._embeddings.stored(caption), position, caption, lowres)

    def picture(self, position: int) -> int:
        """Which picture of the source stands at a position."""
        epoch, place = divmod(position, len(self._indices))
        return self._indices[self._epoch_order(epoch)[place]]

    def collate(self, samples: list[TrainingSample]) -> Batch:
        """Stacks samples."""
        images = torch.from_numpy(np.stack([sample.image for sample in samples]))
        embeds = [sample.text_embeds for sample in samples]
        text_embeds, text_mask = pad_embeddings(embeds, self._max_text_len)
        return Batch(
            images,
            text_embeds,
            text_mask,
            torch.tensor([sample.position for sample in samples]),
            [sample.caption for sample in samples],
            *self._other_lowres(samples),
        )

    def _other_lowres(self, samples: list[TrainingSample]) -> tuple[Tensor, Tensor] | tuple[()]:
        if self._lowres is None:
            return ()
        lowres = np.zeros((len(samples), 3, self._lowres.side, self._lowres.side), np.uint8)
        has = np.zeros(len(samples), bool)
        for row, sample in enumerate(samples):
            if sample.lowres is not None:
                lowres[row], has[row] = sample.lowres, True
        return torch.from_numpy(lowres), torch.from_numpy(has)

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
