"""Whether pictures show the colours that their captions name."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# English names that have one place in hue, saturation and value. Not white, which is the paper
# that most drawings are on.
WORDS = {
    "red": "red", "crimson": "red", "scarlet": "red",
    "orange": "orange",
    "yellow": "yellow", "golden": "yellow",
    "green": "green",
    "blue": "blue",
    "purple": "purple", "violet": "purple",
    "pink": "pink",
    "brown": "brown",
    "black": "black",
    "grey": "grey", "gray": "grey",
}  # fmt: skip
NAMES = tuple(dict.fromkeys(WORDS.values()))
SHOWN = 0.1  # of a picture's pixels that are not white, to count as shown
# Degrees of hue at which one colour ends and the next begins.
_HUES = ((15, "red"), (42, "orange"), (70, "yellow"), (165, "green"), (260, "blue"),
         (295, "purple"), (345, "pink"), (360, "red"))  # fmt: skip


class ColourWords(NamedTuple):
    """What captions ask for and pictures show."""

    asked: int  # colours named, over all captions
    shown: float  # share of them that the generated pictures show
    real_shown: float  # the same of the real pictures: no caption is meant so literally


def asked_for(caption: str) -> list[str]:
    """The colours that a caption names, each once."""
    words = re.findall(r"[a-z]+", caption.lower())
    return list(dict.fromkeys(WORDS[word] for word in words if word in WORDS))


def shares(images: Tensor) -> Tensor:
    """Share of each of `NAMES` among the pixels that are not white.

    Args:
        images: (N, 3, H, W) in [-1, 1].

    Returns:
        (N, len(NAMES)) in [0, 1]; zero for a white picture.
    """
    red, green, blue = ((images.float() + 1) / 2).unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    saturation = chroma / value.clamp(min=1e-6)
    # Sectors of 60 degrees from the largest colour; HSV as usual.
    safe = chroma.clamp(min=1e-6)
    hue = torch.where(
        value == red, (green - blue) / safe % 6,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    ) * 60  # fmt: skip

    black, pale = value < 0.2, (value >= 0.2) & (saturation < 0.15)
    white = pale & (value > 0.85)
    coloured = ~black & ~pale
    found = dict.fromkeys(NAMES, torch.zeros_like(black))
    lower = 0.0
    for upper, name in _HUES:
        found[name] = found[name] | (coloured & (hue >= lower) & (hue < upper))
        lower = upper
    light = found["red"] & (value > 0.7) & (saturation < 0.55)
    dark = (found["red"] | found["orange"]) & (value < 0.65) & (hue > 5) & (hue < 42)
    found["pink"] = found["pink"] | light
    found["red"] = found["red"] & ~light & ~dark
    found["brown"], found["orange"] = dark, found["orange"] & ~dark
    found["black"], found["grey"] = black, pale & ~white
    counts = torch.stack([found[name].flatten(1).sum(1) for name in NAMES], 1)
    return counts / (~white).flatten(1).sum(1, keepdim=True).clamp(min=1)


def agreement(captions: Sequence[str], generated: Tensor, real: Tensor) -> ColourWords | None:
    """How many of the colours asked for are shown; None where no caption names one.

    Args:
        captions: N of them.
        generated: `shares` of the pictures made from them.
        real: `shares` of their own pictures.
    """
    pairs = [
        (i, NAMES.index(name)) for i, caption in enumerate(captions) for name in asked_for(caption)
    ]
    if not pairs:
        return None
    rows, columns = torch.tensor(pairs).T
    shown = [(of[rows, columns] >= SHOWN).float().mean().item() for of in (generated, real)]
    return ColourWords(len(pairs), *shown)
