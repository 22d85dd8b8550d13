"""Malformed pictures: 61 kinds that data sets hold, and byte-mutants of good ones."""

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 60, 44


def photo() -> Image.Image:
    """A smooth picture with a little noise, the same at every call."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(int)
    noise = rng.integers(-8, 9, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def grey(dtype: type, scale: float) -> Image.Image:
    ramp = np.tile(np.linspace(0, scale, WIDTH), (HEIGHT, 1))
    return Image.fromarray(ramp.astype(dtype))


def with_alpha(mode: str) -> Image.Image:
    image = photo().convert(mode)
    image.putalpha(grey(np.uint8, 255))
    return image


def animation(format: str) -> bytes:
    frames = [photo(), Image.new("RGB", (WIDTH, HEIGHT), "red")]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:])


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo(), "JPEG", exif=exif)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def bomb(width: int, height: int) -> bytes:
    """A black 1-bit picture: some kilobytes that unpack to width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + width // 8)), 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", rows)
        + png_chunk(b"IEND", b"")
    )


def text_bomb() -> bytes:
    """A good picture with a compressed comment of 100 MB."""
    good = encoded(photo(), "PNG")
    comment = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9))
    return good[:33] + comment + good[33:]  # after the header chunk


def flipped(data: bytes, seed: int) -> bytes:
    damaged = bytearray(data)
    rng = random.Random(seed)
    for _ in range(3):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def cut(data: bytes, percent: int) -> bytes:
    return data[: len(data) * percent // 100]


def contents() -> dict[str, tuple[bytes, bool | None]]:
    """File name: its bytes and whether it can be used; None where both are right."""
    jpeg, png = encoded(photo(), "JPEG"), encoded(photo(), "PNG")
    one_pixel = photo().resize((1, 1))
    palette = photo().quantize(16)
    solid = {level: Image.new("RGB", (40, 40), (level,) * 3) for level in (0, 128, 255)}
    return {
        "photo.jpg": (jpeg, True),
        "photo.png": (png, True),
        "photo.webp": (encoded(photo(), "WEBP", lossless=True), True),
        "empty.jpg": (b"", False),
        "one_byte.jpg": (b"\xff", False),
        "text.jpg": (b"hello", False),
        "page.jpg": (b"<!DOCTYPE html><html>404 not found</html>", False),
        "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', False),
        **{f"cut_{p}.jpg": (cut(jpeg, p), False) for p in (10, 30, 50, 70, 90)},
        "cut_99.jpg": (cut(jpeg, 99), None),
        **{f"cut_{p}.png": (cut(png, p), False) for p in (10, 50, 90)},
        "cut_99.png": (cut(png, 99), None),
        **{f"flipped_{seed}.jpg": (flipped(jpeg, seed), None) for seed in range(6)},
        **{f"flipped_{seed}.png": (flipped(png, seed), None) for seed in range(6)},
        "cmyk.jpg": (encoded(photo().convert("CMYK"), "JPEG"), True),
        "l.png": (encoded(photo().convert("L"), "PNG"), True),
        "la.png": (encoded(with_alpha("L"), "PNG"), True),
        "rgba.png": (encoded(with_alpha("RGB"), "PNG"), True),
        "p.png": (encoded(palette, "PNG"), True),
        "p_transparent.png": (encoded(palette, "PNG", transparency=0), True),
        "1_bit.png": (encoded(photo().convert("1"), "PNG"), True),
        "16_bit.png": (encoded(grey(np.uint16, 65535), "PNG"), True),
        "16_bit.tiff": (encoded(grey(np.uint16, 65535), "TIFF"), True),
        "float.tiff": (encoded(grey(np.float32, 1), "TIFF"), False),
        "animated.gif": (animation("GIF"), True),
        "animated.webp": (animation("WEBP"), True),
        "exif_6.jpg": (turned(6), True),
        "exif_99.jpg": (turned(99), True),
        "1x1.png": (encoded(one_pixel, "PNG"), True),
        "1x2000.png": (encoded(one_pixel.resize((1, 2000)), "PNG"), True),
        "2000x1.png": (encoded(one_pixel.resize((2000, 1)), "PNG"), True),
        **{f"solid_{level}.png": (encoded(image, "PNG"), True) for level, image in solid.items()},
        "bomb_100_mp.png": (bomb(10_000, 10_000), False),
        "bomb_200_mp.png": (bomb(20_000, 10_000), False),
        "header_2g.png": (png_header(2**31 - 1, 2**31 - 1) + png_chunk(b"IDAT", b""), False),
        "header_0.png": (png_header(0, 0) + png_chunk(b"IDAT", b""), False),
        "text_bomb.png": (text_bomb(), False),
        "really_png.jpg": (png, True),
        "really_jpeg.png": (jpeg, True),
    }


def write_corpus(folder: Path) -> dict[str, bool | None]:
    """Writes the 61 entries and says which of them can be used (None: either is right)."""
    folder.mkdir(parents=True)
    entries = contents()
    for name, (data, _) in entries.items():
        (folder / name).write_bytes(data)
    outside = folder.with_name("outside.png")
    outside.write_bytes(encoded(photo(), "PNG"))
    (folder / "folder.png").mkdir()
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "escaping.png").symlink_to(outside)
    os.mkfifo(folder / "pipe.png")
    usable = {name: is_usable for name, (_, is_usable) in entries.items()}
    special = ("folder.png", "dangling.png", "escaping.png", "pipe.png")
    return usable | dict.fromkeys(special, False)


# ------------------------------------------------------------------------------- byte-mutants


def originals() -> list[bytes]:
    """Small good pictures of every format and most modes."""
    image = photo()
    return [
        encoded(image, "JPEG"),
        encoded(image, "JPEG", progressive=True),
        encoded(image.convert("CMYK"), "JPEG"),
        turned(6),
        encoded(image, "PNG"),
        encoded(with_alpha("RGB"), "PNG"),
        encoded(image.quantize(16), "PNG", transparency=0),
        encoded(grey(np.uint16, 65535), "PNG"),
        encoded(image, "WEBP"),
        encoded(with_alpha("RGB"), "WEBP", lossless=True),
        animation("WEBP"),
        animation("GIF"),
        encoded(image, "BMP"),
        encoded(image, "TIFF"),
        encoded(image, "TIFF", compression="tiff_lzw"),
        encoded(image, "TIFF", compression="jpeg"),
    ]


def _flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 30)):
        data[rng.randrange(len(data))] = rng.randrange(256)


def _damage_head(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(min(64, len(data)))] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF))


def _extreme_number(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) - 4)
    value = rng.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1))
    data[at : at + 4] = value.to_bytes(4, rng.choice(("big", "little")))


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(1, len(data)) :]


def _delete(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randint(1, 64)]


def _repeat(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.randint(1, 256)] * rng.randint(1, 20)


MUTATIONS: list[Callable[[bytearray, random.Random], None]] = [
    _flip, _damage_head, _extreme_number, _cut, _delete, _repeat,
]  # fmt: skip


def mutant(seed: int) -> bytes:
    """A good picture, damaged in a way that depends on the seed alone."""
    rng = random.Random(seed)
    data = bytearray(rng.choice(originals()))
    rng.choice(MUTATIONS)(data, rng)
    return bytes(data)
