"""A sheet: pictures in rows and columns, with a caption for each row and each column."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from imagen_scale.files import lettering
from imagen_scale.files.pictures import MARGIN, MAX_CELL, MIN_CELL

LINE = 18  # pixels of a line of text
SIZE = 13  # of the letters


def draw_sheet(
    cells: Sequence[Sequence[Any]], *, columns: Sequence[str], rows: Sequence[str], title: str
) -> Any:
    """Draws a sheet.

    Args:
        cells: By row, then by column: (H, W, 3) uint8, all of one size.
        columns: A caption above each column.
        rows: A caption before each row; all empty where there is one row.
        title: A line above all.

    Returns:
        (H, W, 3) uint8.
    """
    side = min(max(MIN_CELL, cells[0][0].shape[0]), MAX_CELL)
    left = MARGIN + round(max(lettering.width(row, SIZE) for row in rows))
    left += MARGIN if left > MARGIN else 0
    cell = max(side, *(round(lettering.width(one, SIZE)) for one in columns))
    width = left + len(columns) * (cell + MARGIN)
    width = max(width, 2 * MARGIN + round(lettering.width(title, SIZE)))
    top = 2 * (LINE + MARGIN)
    sheet = Image.new("RGB", (width, top + len(rows) * (side + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    lettering.write(draw, (MARGIN, MARGIN), title, SIZE)
    for c, column in enumerate(columns):
        lettering.write(draw, (left + c * (cell + MARGIN), LINE + MARGIN), column, SIZE)
    for r, row in enumerate(rows):
        y = top + r * (side + MARGIN)
        lettering.write(draw, (MARGIN, y + (side - SIZE) // 2), row, SIZE)
        for c, picture in enumerate(cells[r]):
            way = Image.Resampling.NEAREST if picture.shape[0] <= side else Image.Resampling.LANCZOS
            sheet.paste(
                Image.fromarray(picture).resize((side, side), way), (left + c * (cell + MARGIN), y)
            )
    return np.asarray(sheet)
