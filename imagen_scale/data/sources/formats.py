"""Which pictures are read, and how those that are not are known: by ending and by first bytes."""

import functools
from pathlib import PurePath
from typing import NamedTuple

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo"),
    *(".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif"),
)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
HEAD_BYTES = 512  # enough to tell what a file is


class Plugin(NamedTuple):
    """A package that teaches Pillow a format."""

    format: str
    package: str
    endings: tuple[str, ...]


PLUGINS = (
    Plugin("HEIF", "pillow-heif", (".heic", ".heif", ".hif")),
    Plugin("JXL", "pillow-jxl-plugin", (".jxl",)),
)
# Pictures nobody reads here: they are counted and named.
FOREIGN = (
    *(".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jxr", ".wdp", ".avifs", ".svg", ".svgz", ".eps"),
    *(".psd", ".psb", ".xcf", ".kra", ".clip", ".ai", ".ico", ".cur", ".tga", ".dds", ".qoi"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".pcx", ".exr", ".hdr", ".dng", ".cr2", ".cr3"),
    *(".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw", ".bpg", ".flif", ".wmf"),
)
PICTURES = (*EXTENSIONS, *(ending for one in PLUGINS for ending in one.endings), *FOREIGN)

_ISO_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIF"
)
_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\xff\x0a": "JXL",
    b"\0\0\0\x0cJXL \r\n": "JXL",
    b"\0\0\0\x0cjP  \r\n": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"8BPS": "Photoshop",
    b"qoif": "QOI",
    b"v/1\x01": "OpenEXR",
    b"<svg": "SVG",
}


@functools.cache
def plugin_formats() -> tuple[str, ...]:
    """Formats of the plugins that are installed; Pillow knows them from then on."""
    found = []
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
        found.append("HEIF")
    except ImportError:
        pass
    try:
        import pillow_jxl  # noqa: F401  # registers itself

        found.append("JXL")
    except ImportError:
        pass
    return tuple(found)


def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read here."""
    return FORMATS + plugin_formats()


def readable_endings() -> tuple[str, ...]:
    """Endings of the pictures that are read here, in small letters with their dot."""
    extra = (ending for one in PLUGINS if one.format in plugin_formats() for ending in one.endings)
    return (*EXTENSIONS, *extra)


def ending_of(name: str) -> str:
    """The last ending of a file's name in small letters, with its dot; may be empty."""
    return PurePath(name).suffix.lower()


def format_of(head: bytes) -> str | None:
    """The format of a picture by its first bytes (`HEAD_BYTES` of them); None if it is none."""
    for start, name in _STARTS.items():
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "BMP"
    if head[4:8] == b"ftyp":
        # The major brand may be general, and what it is among the compatible ones.
        brands = head[8 : min(len(head), int.from_bytes(head[:4], "big"))]
        known = [_ISO_BRANDS.get(brands[i : i + 4]) for i in range(0, len(brands), 4)]
        return "AVIF" if "AVIF" in known else next(filter(None, known), None)
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<?xml") and b"<svg" in head:
        return "SVG"
    return None


def why_not_read(name: str, head: bytes = b"") -> str:
    """Why a picture of a kind that is not read is left out, and what helps.

    Args:
        name: Of the file.
        head: Its first bytes, where they were looked at.
    """
    form = format_of(head)
    ending = ending_of(name)
    for plugin in PLUGINS:
        if form == plugin.format or (form is None and ending in plugin.endings):
            if plugin.format in plugin_formats():
                break
            return (
                f"is a {plugin.format} picture, which needs the package {plugin.package}; run "
                f"pip install {plugin.package}, or convert it."
            )
    readable = ", ".join(readable_formats())
    if form in readable_formats():
        return f"is a {form} picture that cannot be opened; repair it or remove it."
    if form or ending in FOREIGN:
        kind = form or f"the kind {ending}"
        return f"is a picture of {kind}; the formats that are read are {readable}: convert it."
    return f"not a picture in one of the formats {readable}; convert it or remove it."
