"""Pictures as numbers, and many of them as one captioned grid."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from imagen_scale.files import lettering
from imagen_scale.files.labels import fit_labels
from imagen_scale.files.picture_files import save_image


def from_uint8(pictures: Tensor) -> Tensor:
    """Levels of 0 to 255 as float32 in [-1, 1], the same shape."""
    return pictures.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Any:
    """Images in [-1, 1], (B, 3, H, W), as a NumPy array (B, H, W, 3) uint8."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


MARGIN = 6
LABEL_HEIGHT = 16
LETTERS = 11  # their size in pixels
LETTERS_APART = 15  # from line to line
FRAME = (208, 208, 208)
MAX_COLUMNS = 8
GRID_LIMIT = 64  # pictures in the grid of a command; each is also a file of its own
MAX_CELL = 512  # larger pictures are shrunk here
MIN_CELL = 128  # small pictures are enlarged, pixel by pixel, so that a person can see them


def save_grid(
    path: Path, rows: Sequence[Sequence[Any]], labels: Sequence[str], *, lines: int = 1
) -> None:
    """Writes a grid with a caption over each column, at most `MAX_COLUMNS` wide.

    Args:
        path: The PNG file.
        rows: Each row holds one (H, W, 3) uint8 array per column; sizes may differ by row.
        labels: One caption per column.
        lines: Lines of each caption that are shown.
    """
    label_height = lines * LABEL_HEIGHT
    sides = [image.shape[0] for row in rows for image in row]
    cell = min(max(MIN_CELL, *sides), MAX_CELL)
    columns = min(len(labels), MAX_COLUMNS)
    band_height = label_height + MARGIN + len(rows) * (cell + MARGIN)
    size = (MARGIN + columns * (cell + MARGIN), -(-len(labels) // columns) * band_height)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for i, label in enumerate(fit_labels(labels, width=cell, size=LETTERS, lines=lines)):
        band, column = divmod(i, columns)
        x, y = MARGIN + column * (cell + MARGIN), band * band_height
        # A frame: what stands over a picture is not what stands below the one above.
        left, right = x - MARGIN // 2, x + cell + MARGIN // 2
        draw.rectangle((left, y, right, y + band_height), outline=FRAME)
        for number, line in enumerate(label):
            lettering.write(draw, (x, y + 3 + number * LETTERS_APART), line, LETTERS)
        for r, row in enumerate(rows):
            picture = Image.fromarray(row[i])
            enlarges = picture.width <= cell
            picture = picture.resize(
                (cell, cell), Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS
            )
            grid.paste(picture, (x, y + label_height + MARGIN + r * (cell + MARGIN)))
    save_image(path, grid)
