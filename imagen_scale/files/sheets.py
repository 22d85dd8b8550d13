"""A sheet: pictures in rows and columns, with a caption for each row and each column."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
    font = ImageFont.load_default(size=SIZE)
    side = min(max(MIN_CELL, cells[0][0].shape[0]), MAX_CELL)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = MARGIN + round(max(measure.textlength(row, font=font) for row in rows))
    left += MARGIN if left > MARGIN else 0
    cell = max(side, *(round(measure.textlength(one, font=font)) for one in columns))
    width = left + len(columns) * (cell + MARGIN)
    width = max(width, 2 * MARGIN + round(measure.textlength(title, font=font)))
    top = 2 * (LINE + MARGIN)
    sheet = Image.new("RGB", (width, top + len(rows) * (side + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, fill="black", font=font)
    for c, column in enumerate(columns):
        draw.text((left + c * (cell + MARGIN), LINE + MARGIN), column, fill="black", font=font)
    for r, row in enumerate(rows):
        y = top + r * (side + MARGIN)
        draw.text((MARGIN, y + (side - SIZE) // 2), row, fill="black", font=font)
        for c, picture in enumerate(cells[r]):
            way = Image.Resampling.NEAREST if picture.shape[0] <= side else Image.Resampling.LANCZOS
            sheet.paste(
                Image.fromarray(picture).resize((side, side), way), (left + c * (cell + MARGIN), y)
            )
    return np.asarray(sheet)
