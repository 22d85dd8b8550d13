"""Colour profiles: what a picture's numbers mean, turned into sRGB, which everything here is.

Whether a profile says something else than sRGB is seen from what it does, not from its name: those
of sRGB are written by many hands. Numbers of a picture with such a profile, or without one, stay
bit by bit as they are.
"""

import functools
import io
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageCms

# Levels by which profiles of sRGB itself move a colour: they are written with 16 bits at most.
SAME = 3
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}


class Correction(NamedTuple):
    """What a profile asks for.

    Attributes:
        kind: "converted" to sRGB, or "ignored", since it is broken or of another kind of picture.
        transform: From the picture's numbers to sRGB; None where it is ignored.
    """

    kind: Literal["converted", "ignored"]
    transform: ImageCms.ImageCmsTransform | None


def correction(image: Image.Image) -> Correction | None:
    """What the profile of an opened picture asks for; None without one and with one of sRGB."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not profile:
        return None
    return _correction(profile, _base(image.mode))


def in_srgb(image: Image.Image, mode: str, wanted: Correction | None) -> Image.Image:
    """A picture of 8 bits as `mode` ("RGB" or "RGBA") in sRGB.

    Args:
        image: The picture, or a part of it.
        mode: What is wanted; "RGBA" keeps its transparency.
        wanted: Of the picture that it is a part of.
    """
    if wanted is None or wanted.transform is None:
        return image.convert(mode)
    base = _base(image.mode)
    has_alpha = mode == "RGBA"
    alpha = image.convert("RGBA").getchannel("A") if has_alpha else None
    converted = ImageCms.applyTransform(image.convert(base), wanted.transform)
    assert converted is not None  # it is only where it changes a picture in place
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _base(mode: str) -> str:
    """The mode without transparency and palette, in which a profile is meant."""
    if mode in ("1", "L", "LA", "La") or mode.startswith("I;16"):
        return "L"
    return "CMYK" if mode == "CMYK" else "RGB"


@functools.lru_cache(maxsize=32)
def _correction(profile: bytes, base: str) -> Correction | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[base]:
            return Correction("ignored", None)
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), base, "RGB")
        is_same = base != "CMYK" and _moves(transform, base) <= SAME
    except Exception:  # on damaged profiles it raises several types
        return Correction("ignored", None)
    return None if is_same else Correction("converted", transform)


def _moves(transform: ImageCms.ImageCmsTransform, base: str) -> int:
    """How far a transform moves a colour at most, of colours from all over the cube."""
    levels = np.linspace(0, 255, 18).astype(np.uint8)
    if base == "L":
        before = Image.fromarray(levels[None])
    else:
        cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
        before = Image.fromarray(cube.reshape(18, -1, 3))
    after = ImageCms.applyTransform(before, transform)
    assert after is not None
    return int(np.abs(np.asarray(after).astype(int) - np.asarray(before.convert("RGB"))).max())
