"""Lists of pictures with their captions: tables and JSON lines.

A row that does not fit its header is refused with its line: what would be read of it is not what
was written, and a caption cut at its first comma trains on without a word.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imagen_scale.config.strict_json import refuse_duplicates
from imagen_scale.errors import DataError

Row = tuple[int, dict[str, Any]]  # line and content


def csv_rows(file: Path, text: str, needed: Sequence[str]) -> Iterator[Row]:
    """The rows of a table whose first row names the columns.

    Rows of nothing but blanks are passed over, and so are empty cells beyond the last column: that
    is how spreadsheets end lines and files.

    Args:
        file: What errors name.
        text: Its content.
        needed: Columns that may stand only once.

    Raises:
        DataError: If a row is no CSV, or holds more or fewer cells than there are columns.
    """
    rows = _cells(file, text)
    _, header = next(rows, (0, []))
    columns = [name.strip() for name in header]
    while columns and not columns[-1]:
        columns.pop()
    for name in needed:
        if columns.count(name) > 1:
            raise DataError(f"{file}: the column {name!r} stands twice; rename one of them.")
    for line, cells in rows:
        if any(cell.strip() for cell in cells[len(columns) :]) or len(cells) < len(columns):
            raise DataError(
                f"{file}, line {line}: has {len(cells)} cells and its header {len(columns)} "
                f"({', '.join(columns)}); put a caption with commas, quotes or line breaks in "
                f'quotes, as in 1.png,"a cat, asleep", or write metadata.jsonl.'
            )
        yield line, dict(zip(columns, cells, strict=False))


def jsonl_rows(file: Path, text: str) -> Iterator[Row]:
    """The rows of JSON lines, each an object.

    Raises:
        DataError: If a line is no object, or names a key twice.
    """
    for line, raw in enumerate(io.StringIO(text, newline=""), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw, object_pairs_hook=refuse_duplicates)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {line}: not JSON: {error}; correct the line.") from None
        if not isinstance(row, dict):
            raise DataError(
                f"{file}, line {line}: holds a {type(row).__name__}; write an object such as "
                f'{{"file_name": "1.png", "text": "a red heart"}}.'
            )
        yield line, row


def read_text(file: Path) -> str:
    """UTF-8 text with or without a byte-order mark, lines ending in LF."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError("is not UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}; correct that.") from None


def _cells(file: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that hold something, with the lines at which they begin."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}, line {line}: not a CSV row: {error}; correct it.") from None
