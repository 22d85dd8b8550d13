"""Writing pictures: single PNG files and captioned grids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from imagen_scale.checkpoint import write_atomically

MARGIN = 6
LABEL_HEIGHT = 16
MIN_CELL = 128  # small pictures are enlarged, pixel by pixel, so that a person can see them


def save_png(path: Path, image: Any) -> None:
    """Writes one picture.

    Args:
        path: The PNG file.
        image: (H, W, 3) uint8.
    """
    _save(path, Image.fromarray(image))


def save_grid(path: Path, rows: Sequence[Sequence[Any]], labels: Sequence[str]) -> None:
    """Writes a grid with a caption over each column.

    Args:
        path: The PNG file.
        rows: Each row holds one (H, W, 3) uint8 array per column; sizes may differ by row.
        labels: One caption per column.
    """
    cell = max(MIN_CELL, *(image.shape[0] for row in rows for image in row))
    width = MARGIN + len(labels) * (cell + MARGIN)
    height = LABEL_HEIGHT + MARGIN + len(rows) * (cell + MARGIN)
    grid = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=11)
    for column, label in enumerate(labels):
        x = MARGIN + column * (cell + MARGIN)
        draw.text((x, 3), _fit(draw, label, font, cell), fill="black", font=font)
        for r, row in enumerate(rows):
            picture = Image.fromarray(row[column]).resize((cell, cell), Image.Resampling.NEAREST)
            grid.paste(picture, (x, LABEL_HEIGHT + MARGIN + r * (cell + MARGIN)))
    _save(path, grid)


def _fit(draw: ImageDraw.ImageDraw, label: str, font: Any, width: int) -> str:
    """The label on one line, cut to the width of its column."""
    label = " ".join(label.split())
    if draw.textlength(label, font=font) <= width:
        return label
    while label and draw.textlength(label + "...", font=font) > width:
        label = label[:-1]
    return label + "..."


def _save(path: Path, image: Image.Image) -> None:
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))
