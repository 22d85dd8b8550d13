"""Pictures as uint8 arrays: read, oriented and resized, at bounded cost."""

import errno
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from imagen_scale.data.sources.formats import HEAD_BYTES, readable_formats, why_not_read
from imagen_scale.data.sources.profiles import Correction, correction, in_srgb
from imagen_scale.data.sources.walk import head_of
from imagen_scale.data.storage import first_line
from imagen_scale.errors import DataError, EnvironmentProblem

PixelArray = npt.NDArray[np.uint8]  # (3, size, size) RGB
Colour = tuple[int, int, int]  # RGB, 0 to 255

# Larger pictures are refused before they are decoded. What decoding takes per pixel differs: a
# WebP up to 20 bytes, a progressive JPEG 8, others 4; a plain JPEG is shrunk while it is decoded,
# and what video codecs packed takes long.
# With these limits none takes more than 500 MB and 2 s; `benchmarks/faults.py largest` measures it.
MAX_PIXELS = 50_000_000
MAX_PIXELS_OF = {
    **{"WEBP": 20_000_000, "plain JPEG": 100_000_000},
    **{"AVIF": 25_000_000, "HEIF": 25_000_000, "JXL": 20_000_000},
}
MAX_FILE_BYTES = 200_000_000  # a decoder may read the whole file before it looks at the header

CHECK_SIZE = 8  # decoding finds the damage, whatever size is asked for

# Cheap halvings may be done first as long as the picture stays this many times larger than what
# is wanted: the result then cannot be told from a plain Lanczos resize.
REDUCING_GAP = 3
STRIP_PIXELS = 2**20  # converted at a time, so that no second copy of a large picture is made

# Not the picture's fault, and perhaps gone at the next attempt.
_TROUBLE = {errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT}

_UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_picture(
    file: Path | BinaryIO, size: int, *, place: float | None = None, pad: Colour | None = None
) -> PixelArray:
    """Reads a picture: its shorter side is resized to `size`, then its centre square is kept.

    The format is told by content, not by name. EXIF orientation is applied, transparency is laid
    over white, 16 bits are scaled to 8, a colour profile that is not sRGB's is applied, and of an
    animation the first frame is taken. Brightness and contrast stay as they are.

    Args:
        file: Path or binary file.
        size: Side of the square in pixels.
        place: Where along the longer side the square is taken instead, in [0, 1).
        pad: The longer side is resized to `size` instead, and the rest has this colour.

    Returns:
        RGB picture, (3, size, size) uint8.

    Raises:
        DataError: If the file is not a readable picture of a known format, or too large; with
            the reason only, since the caller knows the picture's name.
        EnvironmentProblem: If the disk, not the picture, is in trouble.
    """
    with _opened(file) as image:
        # JPEG only: lets the decoder itself do the coarse part of the reduction.
        image.draft(None, (REDUCING_GAP * size, REDUCING_GAP * size))
        image.load()
        # Read after loading: Pillow orients TIFF while it loads it and then drops the tag.
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        box = (0, 0, *image.size) if pad else _square_box(*image.size, place)
        resized = _resized(image, box, size, correction(image))
    # What is centred, or lies anywhere, may as well be turned at the end.
    picture = _as_array(resized, orientation)
    return picture if pad is None else _padded(picture, size, pad)


def load_whole_picture(file: Path) -> npt.NDArray[np.uint8]:
    """Reads a picture as it is: any size and shape, oriented and over white as `load_picture` does.

    Args:
        file: Path.

    Returns:
        RGB picture, (3, height, width) uint8.

    Raises:
        DataError: As `load_picture`.
    """
    with _opened(file) as image:
        image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        mode = "RGBA" if image.has_transparency_data else "RGB"
        return _as_array(in_srgb(_to_8_bits(image), mode, correction(image)), orientation)


def picture_size(file: Path | BinaryIO) -> tuple[int, int]:
    """Width and height of a picture as it is shown, read from its header.

    Raises:
        DataError: As `load_picture`, as far as the header tells.
    """
    with _opened(file) as image:
        is_turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.height, image.width) if is_turned else (image.width, image.height)


def profile_use(file: Path | BinaryIO) -> str | None:
    """What becomes of a picture's colour profile: "converted", "ignored", or None of sRGB's."""
    with _opened(file) as image:
        wanted = correction(image)
    return wanted and wanted.kind


@contextmanager
def _opened(file: Path | BinaryIO) -> Iterator[Image.Image]:
    """Opens a picture and turns whatever goes wrong with it into a DataError."""
    try:
        with warnings.catch_warnings(), _content(file) as content:
            # Of large pictures, which are refused below, and of oddities that do no harm.
            warnings.simplefilter("ignore")
            with Image.open(content, formats=readable_formats()) as image:
                _check_pixels(image)
                yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(why_not_read(_name(file), _head(file))) from None
    except Image.DecompressionBombError as error:
        raise DataError(f"too large: {first_line(error)}; scale it down.") from None
    except Exception as error:  # on damaged files Pillow's decoders raise almost any type
        if getattr(error, "errno", None) in _TROUBLE:
            raise EnvironmentProblem(
                f"{file}: {first_line(error)}; look after the disk and run the command again."
            ) from error
        raise DataError(
            f"the picture cannot be read: {first_line(error)}; repair it or remove it."
        ) from error


def _name(file: Path | BinaryIO) -> str:
    return file.name if isinstance(file, Path) else ""


def _head(file: Path | BinaryIO) -> bytes:
    if isinstance(file, Path):
        return head_of(file, follow_symlinks=True)
    file.seek(0)
    return file.read(HEAD_BYTES)


def _as_array(image: Image.Image, orientation: int | None) -> npt.NDArray[np.uint8]:
    """An RGB or RGBA image turned upright and laid over white, (3, height, width)."""
    if orientation in _UNDO_ORIENTATION:
        image = image.transpose(_UNDO_ORIENTATION[orientation])
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


@contextmanager
def _content(file: Path | BinaryIO) -> Iterator[BinaryIO]:
    """Opens a regular file of bounded size; never waits, as opening a named pipe would."""
    if not isinstance(file, Path):
        yield file
        return
    with open(file, "rb", opener=_open_without_waiting) as content:
        status = os.fstat(content.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise DataError("not a regular file; remove it.")
        if status.st_size > MAX_FILE_BYTES:
            raise DataError(
                f"too large: the file has {status.st_size:,} bytes and at most {MAX_FILE_BYTES:,} "
                f"are read; scale the picture down."
            )
        yield content


def _check_pixels(image: Image.Image) -> None:
    kind = str(image.format)
    if kind == "JPEG":
        kind = "progressive JPEG" if image.info.get("progressive") else "plain JPEG"
    limit = MAX_PIXELS_OF.get(kind, MAX_PIXELS)
    if image.width * image.height > limit:
        raise DataError(
            f"too large: {image.width} x {image.height} pixels, and of a {kind} at most "
            f"{limit:,} are read; scale it down."
        )


Box = tuple[int, int, int, int]  # left, top, width, height


def _square_box(width: int, height: int, place: float | None) -> Box:
    """The centre square of a picture, or the one at a place along its longer side."""
    side = min(width, height)
    left, top = (
        free // 2 if place is None else int(place * (free + 1))
        for free in (width - side, height - side)
    )
    return left, top, side, side


def _resized(image: Image.Image, box: Box, size: int, wanted: Correction | None) -> Image.Image:
    """A part of a picture, its longer side resized to `size`, as RGB or RGBA.

    Cut first: resized as a whole, a picture of 1 x 100,000 pixels would not fit in memory. And
    strip by strip, in which blocks of a large picture's pixels are averaged at once.
    """
    left, top, width, height = box
    longer = max(width, height)
    block = max(1, min(longer // max(REDUCING_GAP * size, 2048), width, height))
    rows = block * max(1, STRIP_PIXELS // (block * width))
    # Never in the palette: its numbers cannot be averaged.
    mode = "RGBA" if image.has_transparency_data else "RGB"
    part = Image.new(mode, (-(-width // block), -(-height // block)))
    for y in range(0, height, rows):
        strip = image.crop((left, top + y, left + width, top + min(y + rows, height)))
        strip = in_srgb(_to_8_bits(strip), mode, wanted)
        part.paste(strip.reduce(block) if block > 1 else strip, (0, y // block))
    return part.resize(
        (max(1, round(size * width / longer)), max(1, round(size * height / longer))),
        Image.Resampling.LANCZOS,
        box=(0, 0, width / block, height / block),
        reducing_gap=REDUCING_GAP,
    )


def _padded(picture: PixelArray, size: int, colour: Colour) -> PixelArray:
    """A picture of at most `size` in the middle of a square of a colour."""
    square = np.empty((3, size, size), np.uint8)
    square[:] = np.asarray(colour, np.uint8)[:, None, None]
    top, left = ((size - side) // 2 for side in picture.shape[1:])
    square[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    return square


def _to_8_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16-bit grey; Pillow itself scales 16-bit colour
        levels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # 65535 / 255 = 257
    if image.mode in ("I", "F"):
        raise DataError("has 32-bit levels, whose range is unknown; convert it to 8 or 16 bits.")
    return image
