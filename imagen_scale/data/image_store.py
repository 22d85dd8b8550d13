"""The pictures of a source, kept ready in one file per size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imagen_scale.data.sources.images import PixelArray
from imagen_scale.data.sources.opening import Source
from imagen_scale.data.storage import Progress, exclusive, written_whole


def stored_sizes(sizes: Sequence[int], length: int, max_bytes: int) -> set[int]:
    """Sizes whose pictures lie ready on disk: one limit for all, the small ones first.

    Args:
        sizes: Sides in pixels, increasing.
        length: Pictures of the source.
        max_bytes: Of all files together.
    """
    stored = set()
    for size in sizes:
        num_bytes = length * bytes_of(size)
        if num_bytes <= max_bytes:
            stored.add(size)
            max_bytes -= num_bytes
    return stored


def bytes_of(size: int) -> int:
    """Of one picture."""
    return 3 * size * size


class ImageStore:
    """The prepared pictures of one source at one size: `store[i]` is (3, size, size) uint8."""

    def __init__(self, size: int, length: int, file: Path | None, source: Source | None) -> None:
        """Use `ImageStore.open` or `decoding`; exactly one of `file` and `source` is given."""
        self.size = size
        self._length = length
        self._file = file
        self._source = source
        self._pictures: npt.NDArray[np.uint8] | None = None

    @classmethod
    def open(
        cls,
        source: Source,
        size: int,
        cache_dir: Path,
        *,
        stored: bool,
        progress: Progress | None = None,
    ) -> "ImageStore":
        """Opens the pictures of `source`, building the prepared file on first use.

        Args:
            source: Where the pictures come from.
            size: Side in pixels.
            cache_dir: The file is `cache_dir/images/<fingerprint>_<size>.npy`.
            stored: Whether there is to be a file; else pictures are decoded at every read.
            progress: Called as pictures are prepared.

        Raises:
            DataError: If a picture cannot be read, although it could when it was checked.
            EnvironmentProblem: If the file cannot be written.
        """
        length = len(source)
        if not stored:
            return cls.decoding(source, size)
        file = cache_dir / "images" / f"{source.fingerprint}_{size}.npy"
        store = cls(size, length, file, None)
        if not store._is_whole():
            with exclusive(file.with_suffix(".lock")):
                if not store._is_whole():  # another process may have built it meanwhile
                    _build(file, source, size, progress)
        return store

    @classmethod
    def decoding(cls, source: Source, size: int) -> "ImageStore":
        """The pictures of `source`, decoded at every read."""
        return cls(size, len(source), None, source)

    @property
    def file(self) -> Path | None:
        """Where the pictures lie ready; None where they are decoded at every read."""
        return self._file

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> PixelArray:
        """The picture at `i`, (3, size, size) uint8, free to be changed."""
        if self._source is not None:
            return self._source.image(i, self.size)
        if self._pictures is None:
            self._pictures = self._map()
        return np.array(self._pictures[i])

    def cropped(self, i: int, place: float) -> PixelArray:
        """The square at a place in [0, 1) along the picture's longer side; of `decoding` only."""
        assert self._source is not None
        return self._source.image(i, self.size, place)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as a full copy; each process opens its own.
        return {**self.__dict__, "_pictures": None}

    def _map(self) -> npt.NDArray[np.uint8]:
        assert self._file is not None
        pictures: npt.NDArray[np.uint8] = np.load(self._file, mmap_mode="r")
        return pictures

    def _is_whole(self) -> bool:
        try:
            pictures = self._map()
        except (OSError, ValueError):  # absent, or cut short: to be built
            return False
        expected = (self._length, 3, self.size, self.size)
        return pictures.shape == expected and pictures.dtype == np.uint8


def _build(file: Path, source: Source, size: int, progress: Progress | None) -> None:
    shape = (len(source), 3, size, size)
    # Plain writes rather than a writable memory map: on a full disk a write raises an error,
    # whereas touching a page of the map would kill the process.
    with written_whole(file) as out:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        for i in range(len(source)):
            out.write(source.image(i, size).tobytes())
            if progress:
                progress(f"preparing pictures ({size} px)", i + 1, len(source))
