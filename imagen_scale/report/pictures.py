"""Pictures inside a page: grids drawn while training, over time, and samples."""

import base64
import io
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image

MAX_FRAMES = 24  # of one stage: the first, the last, and some between
MAX_WIDTH = 1600
MAX_BYTES = 200_000  # of a file that is taken as it is


class Frame(NamedTuple):
    """One picture of a series."""

    step: int
    uri: str  # data:...


def frames(run: Path, unet_number: int) -> tuple[list[Frame], int]:
    """The grids that training drew of one stage, oldest first, and how many there are in all."""
    found = {}
    for path in (run / "samples").glob(f"unet{unet_number}_step_*.png"):
        if match := re.fullmatch(r"unet\d+_step_(\d+)", path.stem):
            found[int(match[1])] = path
    steps = spread(sorted(found), MAX_FRAMES)
    shown = [(step, embedded(found[step])) for step in steps]
    return [Frame(step, uri) for step, uri in shown if uri is not None], len(found)


def newest_grid(run: Path) -> str | None:
    """The grid of the last `imagen-scale sample`."""
    grids = sorted((run / "samples").glob("grid_*.png"))
    return embedded(grids[-1]) if grids else None


def spread(items: list[int], most: int) -> list[int]:
    """At most `most` items, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def embedded(path: Path) -> str | None:
    """A picture as a data URI; large ones are shrunk. None where it cannot be read."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if len(content) <= MAX_BYTES and image.width <= MAX_WIDTH:
                return _uri("png", content)
            picture = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    picture.thumbnail((MAX_WIDTH, 10 * MAX_WIDTH), Image.Resampling.LANCZOS)
    packed = io.BytesIO()
    picture.save(packed, format="WEBP", quality=88)
    return _uri("webp", packed.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
