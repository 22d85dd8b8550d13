"""Pictures as uint8 arrays: read, oriented and resized."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from imagen_scale.data.storage import first_line
from imagen_scale.errors import DataError

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
    return _as_array(square, orientation)  # a centred square may as well be turned at the end


def load_whole_picture(file: Path) -> npt.NDArray[np.uint8]:
    """Reads a picture as it is: any size and shape, oriented and over white as `load_picture` does.

    Args:
        file: Path.

    Returns:
        RGB picture, (3, height, width) uint8.

    Raises:
        DataError: As `load_picture`.
    """
    with _opened(file, str(file)) as image:
        image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        image = _to_8_bits(image, str(file))
        return _as_array(
            image.convert("RGBA" if image.has_transparency_data else "RGB"), orientation
        )


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


def _as_array(image: Image.Image, orientation: int | None) -> npt.NDArray[np.uint8]:
    """An RGB or RGBA image turned upright and laid over white, (3, height, width)."""
    if orientation in _UNDO_ORIENTATION:
        image = image.transpose(_UNDO_ORIENTATION[orientation])
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


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
