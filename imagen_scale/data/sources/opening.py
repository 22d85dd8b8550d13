"""Where pictures and captions come from: emoji, a folder, a Hugging Face data set, or tars."""

from collections.abc import Collection
from typing import Protocol

from imagen_scale.config import DataConfig
from imagen_scale.data.sources.emoji import EmojiSource
from imagen_scale.data.sources.folder import FolderSource
from imagen_scale.data.sources.huggingface import HuggingFaceSource
from imagen_scale.data.sources.images import PixelArray
from imagen_scale.data.sources.skipped import Skipped
from imagen_scale.data.sources.webdataset import WebDatasetSource
from imagen_scale.data.storage import fingerprint


class Source(Protocol):
    """Captioned pictures in a fixed order.

    Attributes:
        captions: One per picture, never empty.
        keys: A stable unique id of each picture: file name, emoji code points, row number
            or name in a tar.
        skipped: Pictures and rows refused for their name, kind or caption.
        notes: Sentences about what was taken as it must have been meant, and about files that are
            not used and count as no pictures.
        fingerprint: Short hex text; changes when the pictures could have changed.
        attribution: What has to be said when the pictures are shown, if anything.
    """

    captions: list[str]
    keys: list[str]
    skipped: list[Skipped]
    notes: list[str]
    fingerprint: str
    attribution: str | None

    def __len__(self) -> int: ...

    def image(self, i: int, size: int, place: float | None = None) -> PixelArray:
        """The picture at `i`, (3, size, size) uint8 RGB; DataError if it cannot be read.

        Args:
            i: Which one.
            size: Side in pixels.
            place: Where along its longer side the square is taken, in [0, 1); None: the centre.
        """

    def check(self, i: int) -> str | None:
        """Why the picture at `i` cannot be used, found by decoding it; None if it can."""

    def profile(self, i: int) -> str | None:
        """What becomes of its colour profile: "converted", "ignored", or None of sRGB's."""

    def size(self, i: int) -> tuple[int, int] | None:
        """Width and height of the picture at `i` in pixels; None of a drawing, which has none."""


def open_source(config: DataConfig) -> Source:
    """Opens the pictures and captions that the `data` section names.

    Raises:
        DataError: If a list of pictures cannot be read or there is none; what is wrong with single
            pictures is noted in `skipped`.
        MissingExtraError: If the source needs a package that is not installed.
    """
    if config.source == "emoji":  # square drawings
        return EmojiSource(config)
    kinds: dict[str, type[FolderSource | WebDatasetSource | HuggingFaceSource]] = {
        "folder": FolderSource, "webdataset": WebDatasetSource, "huggingface": HuggingFaceSource,
    }  # fmt: skip
    source = kinds[config.source](config)
    if config.fit == "pad":
        source.pad_with(config.pad_colour)
    return source


class Without:
    """A source without some of its pictures; the others keep their keys."""

    def __init__(self, source: Source, left_out: Collection[int]) -> None:
        """Leaves the pictures at the indices `left_out` out of `source`."""
        self._source = source
        self._kept = [i for i in range(len(source)) if i not in left_out]
        self.captions = [source.captions[i] for i in self._kept]
        self.keys = [source.keys[i] for i in self._kept]
        self.skipped = source.skipped
        self.notes = source.notes
        self.fingerprint = fingerprint("without", source.fingerprint, sorted(left_out))
        self.attribution = source.attribution

    def __len__(self) -> int:
        return len(self._kept)

    def image(self, i: int, size: int, place: float | None = None) -> PixelArray:
        """The picture at `i`, (3, size, size) uint8 RGB; DataError if it cannot be read."""
        return self._source.image(self._kept[i], size, place)

    def check(self, i: int) -> str | None:
        """Why the picture at `i` cannot be used, found by decoding it; None if it can."""
        return self._source.check(self._kept[i])

    def profile(self, i: int) -> str | None:
        """What becomes of its colour profile: "converted", "ignored", or None of sRGB's."""
        return self._source.profile(self._kept[i])

    def size(self, i: int) -> tuple[int, int] | None:
        """Width and height of the picture at `i` in pixels; None of a drawing, which has none."""
        return self._source.size(self._kept[i])
