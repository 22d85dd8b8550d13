"""Pictures as uint8 arrays: read, oriented, resized, and kept ready in one file per size."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from imagen_scale.data.storage import Progress, exclusive, first_line, written_whole
from imagen_scale.errors import DataError

if TYPE_CHECKING:
    from imagen_scale.data.sources import Source

Picture = npt.NDArray[np.uint8]  # (3, size, size) RGB

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 2**27  # 0.4 GB of RGB; larger pictures are refused before they are decoded
# Cheap halvings may be done first as long as the picture stays this many times larger than what
# is wanted: the result then cannot be told from a plain Lanczos resize.
REDUCING_GAP = 3

_UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_picture(file: Path | BinaryIO, size: int, name: str | None = None) -> Picture:
    """Reads a picture: its shorter side is resized to `size`, then its centre square is kept.

    EXIF orientation is applied, transparency is laid over white, 16 bits are scaled to 8, and of
    an animation the first frame is taken. Brightness and contrast stay as they are.

    Args:
        file: Path or binary file.
        size: Side of the square in pixels.
        name: What error messages call the picture; default: the path.

    Returns:
        RGB picture, (3, size, size) uint8.

    Raises:
        DataError: If the file is not a readable picture of a known format, or too large.
    """
    name = name or str(file)
    with _opened(file, name) as image:
        # JPEG only: lets the decoder itself do the coarse part of the reduction.
        image.draft(None, (REDUCING_GAP * size, REDUCING_GAP * size))
        image.load()
        # Read after loading: Pillow orients TIFF while it loads it and then drops the tag.
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        square = _centre_square(_to_8_bits(image, name), size)
    if orientation in _UNDO_ORIENTATION:  # a centred square may as well be turned at the end
        square = square.transpose(_UNDO_ORIENTATION[orientation])
    if square.mode == "RGBA":
        white = Image.new("RGBA", square.size, "white")
        square = Image.alpha_composite(white, square).convert("RGB")
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))  # (3, size, size)


def check_picture(file: Path | BinaryIO, name: str | None = None) -> None:
    """Reads the header of a picture only.

    Raises:
        DataError: As `load_picture`, except for damage beyond the header.
    """
    with _opened(file, name or str(file)):
        pass


@contextmanager
def _opened(file: Path | BinaryIO, name: str) -> Iterator[Image.Image]:
    """Opens a picture and turns whatever goes wrong with it into a DataError."""
    try:
        with warnings.catch_warnings():
            # Pillow only warns of a large picture; below it is refused.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"it has {image.width} x {image.height} pixels")
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(
            f"{name}: not a picture in one of the formats {', '.join(FORMATS)}; convert it or "
            f"remove it."
        ) from None
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{name}: too large: {error}; at most {MAX_PIXELS:,} pixels are read, so scale it down."
        ) from None
    except Exception as error:  # on damaged files Pillow's decoders raise almost any type
        raise DataError(
            f"{name}: the picture cannot be read: {first_line(error)}; repair it or remove it."
        ) from error


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16-bit grey; Pillow itself scales 16-bit colour
        levels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # 65535 / 255 = 257
    if image.mode in ("I", "F"):
        raise DataError(
            f"{name}: has 32-bit levels, whose range is unknown; convert it to 8 or 16 bits."
        )
    return image


def _centre_square(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side to `size` and cuts the centre, as RGB or RGBA.

    Both in one step: resized as a whole, a picture of 1 x 100,000 pixels would not fit in memory.
    """
    # Never in the palette: its numbers cannot be averaged.
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize(
        (size, size),
        Image.Resampling.LANCZOS,
        box=(left, top, left + side, top + side),
        reducing_gap=REDUCING_GAP,
    )


class ImageStore:
    """The prepared pictures of one source at one size: `store[i]` is (3, size, size) uint8."""

    def __init__(self, size: int, length: int, file: Path | None, source: "Source | None") -> None:
        """Use `ImageStore.open`; exactly one of `file` and `source` is given."""
        self.size = size
        self._length = length
        self._file = file
        self._source = source
        self._pictures: npt.NDArray[np.uint8] | None = None

    @classmethod
    def open(
        cls,
        source: "Source",
        size: int,
        cache_dir: Path,
        max_bytes: int,
        progress: Progress | None = None,
    ) -> "ImageStore":
        """Opens the pictures of `source`, building the prepared file on first use.

        Args:
            source: Where the pictures come from.
            size: Side in pixels.
            cache_dir: The file is `cache_dir/images/<fingerprint>_<size>.npy`.
            max_bytes: If the file would be larger, pictures are decoded at every read instead.
            progress: Called as pictures are prepared.

        Raises:
            DataError: If a picture cannot be read; when pictures are decoded at every read, only
                their headers are looked at here.
            EnvironmentProblem: If the file cannot be written.
        """
        length = len(source)
        if length * 3 * size * size > max_bytes:
            for i in range(length):
                source.check(i)
                if progress:
                    progress(f"checking pictures ({size} px)", i + 1, length)
            return cls(size, length, None, source)
        file = cache_dir / "images" / f"{source.fingerprint}_{size}.npy"
        store = cls(size, length, file, None)
        if not store._is_whole():
            with exclusive(file.with_suffix(".lock")):
                if not store._is_whole():  # another process may have built it meanwhile
                    _build(file, source, size, progress)
        return store

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> Picture:
        """The picture at `i`, (3, size, size) uint8, free to be changed."""
        if self._source is not None:
            return self._source.image(i, self.size)
        if self._pictures is None:
            self._pictures = self._map()
        return np.array(self._pictures[i])

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


def _build(file: Path, source: "Source", size: int, progress: Progress | None) -> None:
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
