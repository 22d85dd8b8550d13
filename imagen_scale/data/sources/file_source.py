"""Sources whose pictures are files, or are read like files."""

import io
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path

from imagen_scale.data.sources.images import (
    CHECK_SIZE,
    Colour,
    PixelArray,
    load_picture,
    picture_size,
    profile_use,
)
from imagen_scale.data.sources.skipped import named
from imagen_scale.data.storage import fingerprint
from imagen_scale.errors import DataError

PIXELS = 2  # part of fingerprints; to be raised when the same file gives other pixels


class FileSource(ABC):
    """What such sources share: see `Source`.

    They say where a picture lies (`_file`) and what errors call it (`_name`).
    """

    keys: list[str]
    fingerprint: str
    pad: Colour | None = None  # see `load_picture`

    def pad_with(self, colour: Colour) -> None:
        """Shows whole pictures from now on, with a colour beside them."""
        self.pad, self.fingerprint = colour, fingerprint("pad", self.fingerprint, colour)

    @abstractmethod
    def _file(self, i: int) -> Path | io.BytesIO:
        """The picture's file; DataError if there is none."""

    @abstractmethod
    def _name(self, i: int) -> str:
        """The picture in an error's words."""

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int, size: int, place: float | None = None) -> PixelArray:
        """The picture at `i`, (3, size, size) uint8 RGB; DataError if it cannot be read."""
        with self._named(i):
            return load_picture(self._file(i), size, place=place, pad=self.pad)

    def check(self, i: int) -> str | None:
        """Why the picture at `i` cannot be used, found by decoding it; None if it can."""
        try:
            load_picture(self._file(i), CHECK_SIZE)
        except DataError as reason:
            return str(reason)
        return None

    def profile(self, i: int) -> str | None:
        """What becomes of its colour profile: "converted", "ignored", or None of sRGB's."""
        with self._named(i):
            return profile_use(self._file(i))

    def size(self, i: int) -> tuple[int, int]:
        """Width and height of the picture at `i` in pixels."""
        with self._named(i):
            return picture_size(self._file(i))

    def _named(self, i: int) -> AbstractContextManager[None]:
        return named(self._name(i))
