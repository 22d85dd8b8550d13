"""Lists of pictures with their captions: tables, JSON and Parquet.

A row that does not fit its header is refused with its line: what would be read of it is not what
was written, and a caption cut at its first comma trains on without a word. A list that is written
a little differently and can mean one thing only is taken, and that is said.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imagen_scale.config.strict_json import refuse_duplicates
from imagen_scale.data.sources.skipped import named, printable
from imagen_scale.data.storage import first_line
from imagen_scale.errors import DataError, MissingExtraError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
FILE_NAME = "file_name"
Row = tuple[str, dict[str, Any]]  # where it stands ("line 3") and its content


class Listing(NamedTuple):
    """What a list holds."""

    rows: list[Row]
    meant: list[str]  # how it was taken, where it is not written as it should be


def read_listing(file: Path, caption_column: str) -> Listing:
    """Reads a list by its kind, which `list_kind` tells from its name.

    Args:
        file: The list.
        caption_column: The column of captions; the other needed one is `FILE_NAME`.

    Raises:
        DataError: If it cannot be read as a whole, with its line.
        MissingExtraError: If it is Parquet and pyarrow is not installed.
    """
    needed = (FILE_NAME, caption_column)
    return _READERS[list_kind(file.name)](file, needed)


def list_kind(name: str) -> str:
    """The kind of a list by its name: "csv", "tsv", "json", "parquet"; "" of no list."""
    name = name.lower()
    if name == "metadata.txt":
        return "csv"
    # Windows hides endings, so that an editor's .txt comes after them.
    ending = name.removesuffix(".txt").rpartition(".")[2] if name.count(".") else ""
    kinds = dict.fromkeys(("json", "jsonl", "json1", "ndjson"), "json")
    return {"csv": "csv", "tsv": "tsv", "parquet": "parquet", **kinds}.get(ending, "")


def matching(wanted: str, names: Iterable[str]) -> str | None:
    """The name that is `wanted`, or the only one that differs by case, blanks, "_" or "-"."""
    names = list(names)
    if wanted in names:
        return wanted
    same = [name for name in names if _plain(name) == _plain(wanted)]
    return same[0] if len(same) == 1 else None


def csv_rows(
    file: Path,
    text: str,
    needed: Sequence[str],
    separator: str = ",",
    *,
    blanks: bool = False,
    start: int = 1,
) -> Iterator[Row]:
    """The rows of a table whose first row names the columns.

    Rows of nothing but blanks are passed over, and so are empty cells beyond the last column: that
    is how spreadsheets end lines and files.

    Args:
        file: What errors name.
        text: Its content.
        needed: Columns that must stand there, once.
        separator: One character.
        blanks: Leave out blanks after a separator, so that a quote may follow them.
        start: Line at which `text` begins.

    Raises:
        DataError: If a needed column is missing, a row is no CSV, or a row holds more or fewer
            cells than there are columns.
    """
    rows = _cells(file, text, separator, blanks, start)
    _, header = next(rows, (0, []))
    columns = [name.strip() for name in header]
    while columns and not columns[-1]:
        columns.pop()
    for name in needed if columns else ():
        _need(file, name, columns)
    meant = [matching(name, columns) for name in needed]
    columns = [needed[meant.index(name)] if name in meant else name for name in columns]
    for line, cells in rows:
        if any(cell.strip() for cell in cells[len(columns) :]) or len(cells) < len(columns):
            raise DataError(
                f"{file}, line {line}: has {len(cells)} cells and its header {len(columns)} "
                f"({', '.join(columns)}), separated by {SEPARATORS.get(separator, separator)}; put "
                f"a caption with such characters, quotes or line breaks in quotes, as in "
                f'1.png{separator}"a cat{separator} asleep", or write metadata.jsonl.'
            )
        yield f"line {line}", dict(zip(columns, cells, strict=False))


def read_text(file: Path) -> str:
    """UTF-8 text with or without a byte-order mark, lines ending in LF.

    Raises:
        DataError: With the reason only.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError("is not UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}; correct that.") from None


def json_caption(text: str, column: str) -> Any:
    """The caption in a JSON object about one picture.

    Raises:
        DataError: With the reason only.
    """
    try:
        facts = json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON: {error}; correct it.") from None
    if not isinstance(facts, dict):
        raise DataError(f"holds a {type(facts).__name__}; write an object.")
    name = matching(column, facts)
    if name is None:
        raise DataError(
            f"has no {column!r} (it has {printable(', '.join(map(str, facts)))}); set "
            f"data.caption_column."
        )
    return facts[name]


def _need(file: Path, name: str, columns: list[str]) -> None:
    if columns.count(name) > 1:
        raise DataError(f"{file}: the column {name!r} stands twice; rename one of them.")
    if matching(name, columns) is None:
        remedy = "add it, or set data.caption_column"
        if name == FILE_NAME:
            remedy = "call the one that names the pictures so; in a table the first row names them"
        raise DataError(
            f"{file}: no row has the column {name!r} (columns: {', '.join(columns)}); {remedy}."
        )


def _text(file: Path) -> str:
    with named(str(file)):
        return read_text(file)


def _table(file: Path, needed: Sequence[str]) -> Listing:
    text, start, meant = _text(file), 1, list[str]()
    usual = "\t" if list_kind(file.name) == "tsv" else ","
    first, _, rest = text.partition("\n")
    if mark := re.fullmatch(r'"?sep=(.)"?[,;]*', first, re.IGNORECASE):
        separator, text, start = mark[1], rest, 2
        meant.append("its first line, which names the separator, is no row")
    else:
        separator = _separator(text, needed, usual)
    if separator != usual:
        meant.append(f"its columns are separated by {SEPARATORS.get(separator, separator)}")
    try:
        rows = list(csv_rows(file, text, needed, separator, start=start))
    except DataError:
        try:
            rows = list(csv_rows(file, text, needed, separator, blanks=True, start=start))
        except DataError:
            rows = []
        if not rows:
            raise
        meant.append("blanks before its quotes are left out")
    header = next(iter(csv.reader([_first_row(text)], delimiter=separator)), [])
    return Listing(rows, meant + _renamed(needed, header))


def _separator(text: str, needed: Sequence[str], usual: str) -> str:
    """What separates the columns: by it, and it alone, the header holds the needed ones."""
    for names in (needed, [FILE_NAME]):
        fitting = []
        for separator in SEPARATORS:
            try:
                header = next(csv.reader([_first_row(text)], delimiter=separator), [])
            except csv.Error:
                continue
            if all(matching(name, header) is not None for name in names):
                fitting.append(separator)
        if usual in fitting or len(fitting) == 1:
            return usual if usual in fitting else fitting[0]
    return usual


def _first_row(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")


def _cells(
    file: Path, text: str, separator: str, blanks: bool, start: int
) -> Iterator[tuple[int, list[str]]]:
    """The rows that hold something, with the lines at which they begin."""
    content = io.StringIO(text, newline="")
    reader = csv.reader(content, strict=True, delimiter=separator, skipinitialspace=blanks)
    line = start
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, cells
            line = reader.line_num + start
    except csv.Error as error:
        raise DataError(f"{file}, line {line}: not a CSV row: {error}; correct it.") from None


def _json(file: Path, needed: Sequence[str]) -> Listing:
    """JSON lines; else one JSON value that holds the rows: in a list, by name, or by column."""
    text = _text(file)
    refusal: DataError | None = None
    rows: list[Row] = []
    try:
        rows = list(_lines(file, text))
    except DataError as error:
        refusal = error
    if refusal or (len(rows) == 1 and not isinstance(rows[0][1].get(FILE_NAME), str)):
        if whole := _whole(text, needed):
            return whole
        if refusal:
            raise refusal
    if rows and all(matching(FILE_NAME, row) is None for _, row in rows):
        columns = dict.fromkeys(name for _, row in rows for name in row)
        _need(file, FILE_NAME, list(columns))
    return _listing(rows, needed, [])


def _lines(file: Path, text: str) -> Iterator[Row]:
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
                f'{{"{FILE_NAME}": "1.png", "text": "a red heart"}}.'
            )
        yield f"line {line}", row


def _whole(text: str, needed: Sequence[str]) -> Listing | None:
    """The rows that one JSON value holds; None where they are none, or could be several things."""
    value, how = _value(text), "it is one JSON list"
    if value is None:  # lines that end in commas are a list without its brackets
        value, how = _value(f"[{text.strip().removesuffix(',')}]"), "its lines end in commas"
    rows: list[dict[str, Any]] = []
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        rows = value
    elif isinstance(value, dict) and value:
        name, caption = (matching(wanted, value) for wanted in needed)
        if name is not None and caption is not None:  # columns, as pandas writes them
            how = "it holds columns"
            columns = [value[name], value[caption]]
            if all(isinstance(column, dict) for column in columns):
                columns = [list(column.values()) for column in columns]
            if all(isinstance(one, list) and len(one) == len(columns[0]) for one in columns):
                pairs = zip(*columns, strict=True)
                rows = [dict(zip(needed, pair, strict=True)) for pair in pairs]
        elif all(isinstance(entry, str) for entry in value.values()):
            how = "it holds captions by file name"
            rows = [dict(zip(needed, pair, strict=True)) for pair in value.items()]
        elif all(
            isinstance(entry, dict) and matching(needed[1], entry) for entry in value.values()
        ):
            how = "it holds rows by file name"
            rows = [{FILE_NAME: key, **entry} for key, entry in value.items()]
    if not rows:
        return None
    return _listing([(f"entry {i}", row) for i, row in enumerate(rows, start=1)], needed, [how])


def _value(text: str) -> Any:
    """One JSON value; None where the text is none."""
    try:
        return json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError):
        return None


def _parquet(file: Path, needed: Sequence[str]) -> Listing:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError(
            f"{file}: Parquet needs the package pyarrow; run pip install pyarrow."
        ) from None
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except Exception as error:  # its errors are of many types
        raise DataError(f"{file}: no Parquet: {first_line(error)}; write it again.") from None
    for name in needed if rows else ():
        _need(file, name, list(rows[0]))
    return _listing([(f"row {i}", row) for i, row in enumerate(rows, start=1)], needed, [])


def _listing(rows: list[Row], needed: Sequence[str], meant: list[str]) -> Listing:
    """Rows whose needed columns are called as they should be."""
    names = dict.fromkeys(name for _, row in rows for name in row)
    near = [name for name in needed if name not in names and matching(name, names)]
    return Listing(
        [(where, _with_names(row, needed)) for where, row in rows], meant + _renamed(near, names)
    )


def _with_names(row: Mapping[str, Any], needed: Sequence[str]) -> dict[str, Any]:
    wanted = {matching(name, row): name for name in needed}
    return {wanted.get(name, name): value for name, value in row.items()}


def _renamed(needed: Iterable[str], names: Iterable[str]) -> list[str]:
    """What has to be said of columns that are called a little differently."""
    names = list(names)
    found = [(name, matching(name, names)) for name in needed]
    return [f"its column {near!r} is taken for {name!r}" for name, near in found if near != name]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", str(name)).casefold()


_READERS: dict[str, Callable[[Path, Sequence[str]], Listing]] = {
    "csv": _table,
    "tsv": _table,
    "json": _json,
    "parquet": _parquet,
}
