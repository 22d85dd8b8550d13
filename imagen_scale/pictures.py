"""Writing pictures: single PNG files and captioned grids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from imagen_scale.checkpoint import write_atomically

MARGIN = 6
LABEL_HEIGHT = 16
MAX_COLUMNS = 8
MAX_CELL = 512  # larger pictures are shrunk here; each is also a file of its own
MIN_CELL = 128  # small pictures are enlarged, pixel by pixel, so that a person can see them


def save_png(path: Path, image: Any) -> None:
    """Writes one picture.

    Args:
        path: The PNG file.
        image: (H, W, 3) uint8.
    """
    _save(path, Image.fromarray(image))


def save_grid(path: Path, rows: Sequence[Sequence[Any]], labels: Sequence[str]) -> None:
    """Writes a grid with a caption over each column, at most `MAX_COLUMNS` wide.

    Args:
        path: The PNG file.
        rows: Each row holds one (H, W, 3) uint8 array per column; sizes may differ by row.
        labels: One caption per column.
    """
    sides = [image.shape[0] for row in rows for image in row]
    cell = min(max(MIN_CELL, *sides), MAX_CELL)
    columns = min(len(labels), MAX_COLUMNS)
    band_height = LABEL_HEIGHT + MARGIN + len(rows) * (cell + MARGIN)
    size = (MARGIN + columns * (cell + MARGIN), -(-len(labels) // columns) * band_height)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=11)
    for i, label in enumerate(labels):
        band, column = divmod(i, columns)
        x, y = MARGIN + column * (cell + MARGIN), band * band_height
        draw.text((x, y + 3), _fit(draw, label, font, cell), fill="black", font=font)
        for r, row in enumerate(rows):
            picture = Image.fromarray(row[i])
            enlarges = picture.width <= cell
            picture = picture.resize(
                (cell, cell), Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS
            )
            grid.paste(picture, (x, y + LABEL_HEIGHT + MARGIN + r * (cell + MARGIN)))
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
