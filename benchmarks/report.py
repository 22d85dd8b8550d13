"""What the benchmarks print: the machine, a Markdown table, a document's part between marks."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click


def machine(*packages: str) -> str:
    """What the figures were measured on.

    Args:
        packages: Distributions whose versions matter.
    """
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cpu = model[1] if model else platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({cpu}), {memory:.0f} GiB; {versions(*packages)}."


def versions(*packages: str) -> str:
    """Python's version and those of the packages."""
    named = (f"{name} {importlib.metadata.version(name)}" for name in packages)
    return ", ".join([f"Python {platform.python_version()}", *named])


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are aligned to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_option(mark: str, help: str = "A document.") -> Callable[[Any], Any]:
    """`--write DOCUMENT`, refused before the minutes of measuring if it lacks the marks."""

    def check(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
        if path is not None:
            split_at_marks(path, mark)
        return path

    kind = click.Path(dir_okay=False, path_type=Path)
    return click.option("--write", type=kind, callback=check, help=help)


def publish(text: str, document: Path | None, mark: str) -> None:
    """Prints what was measured, and puts it into a document where one is asked for."""
    click.echo(text)
    if document is not None:
        write_between_marks(document, mark, text)


def write_between_marks(document: Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises:
        click.UsageError: If the document lacks these lines.
    """
    before, after = split_at_marks(document, name)
    document.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")


def split_at_marks(document: Path, name: str) -> tuple[str, str]:
    """What stands before and after the part between the marks, marks included.

    Raises:
        click.UsageError: If the document lacks them.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = document.read_text(encoding="utf-8") if document.is_file() else ""
    before, has_begin, rest = text.partition(begin)
    _, has_end, after = rest.partition(end)
    if not (has_begin and has_end):
        raise click.UsageError(f"{document} lacks the lines {begin} and {end}; add them.")
    return before + begin, end + after
