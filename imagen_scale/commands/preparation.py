"""What `prepare` prints: tables, or the same as JSON can hold it."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from imagen_scale.data.survey import Survey, cut_sentence
from imagen_scale.data.trial import Estimate, Preparation

LISTED = 5  # bad pictures and duplicates named in the table; the reports have all


def as_dict(done: Preparation) -> dict[str, Any]:
    """The preparation as JSON can hold it."""
    facts = done.survey._asdict()
    facts["skipped"] = [skip._asdict() for skip in done.survey.skipped]
    paths = {"cache": done.cache, "report": done.report, "contact_sheet": done.sheet}
    return {
        **facts,
        "seconds": round(done.seconds, 1),
        **{name: str(path) for name, path in paths.items()},
        "attribution": done.attribution,
        "unwritten": done.unwritten,
    }


def print_preparation(done: Preparation, console: Console) -> None:
    """Prints what was found and prepared."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(done):
        table.add_row(name, text)
    console.print(table, markup=False)


def print_estimate(planned: Estimate, console: Console) -> None:
    """Prints what preparing would take."""
    total = sum(size or 0 for size in planned.picture_bytes.values()) + planned.text_bytes
    console.print(
        f"{planned.pictures:,} pictures and {planned.distinct_captions:,} distinct captions: about "
        f"{_bytes(total)} on disk and {_seconds(planned.seconds)}"
    )
    for name, text in _disk_rows(planned.picture_bytes, planned.text_bytes):
        console.print(f"{name}: {text}", markup=False)


def _rows(done: Preparation) -> Iterator[tuple[str, str]]:
    found = done.survey
    yield (
        "pictures",
        f"{found.pictures:,} usable: {found.trained_on:,} to train on, {found.held_out:,} held out"
        + (f", in {found.groups:,} groups" if found.groups != found.pictures else ""),
    )
    low, middle, high = found.caption_tokens
    cut = f"; {found.cut_captions:,} are cut at {found.max_text_len}" if found.cut_captions else ""
    yield (
        "captions",
        f"{found.distinct_captions:,} distinct, {low:.0f} to {high:.0f} tokens "
        f"(median {middle:.0f}){cut}",
    )
    if found.shorter_sides is None or found.shapes is None:
        yield "sizes", "drawings, rendered at any size"
    else:
        low, middle, high = found.shorter_sides
        yield "shorter side", f"{low:.0f} to {high:.0f} px (median {middle:.0f})"
        yield "shapes", ", ".join(f"{n:,} {name}" for name, n in found.shapes.items() if n)
    if found.cut:
        yield "cut", cut_sentence(found.cut, found.pictures)
    for size, count in found.enlarged.items():
        if count:
            yield (
                f"enlarged to {size} px",
                f"{count:,} of {found.pictures:,}: their shorter side is smaller, so this stage "
                f"learns blur from them",
            )
    yield from _duplicate_rows(found)
    yield "left out", f"{len(found.skipped):,}"
    for skip in found.skipped[:LISTED]:
        yield "", f"{skip.picture}: {skip.reason}"
    if len(found.skipped) > LISTED:
        yield "", f"and {len(found.skipped) - LISTED:,} more in the report"
    for i, note in enumerate(found.notes):
        yield "" if i else "noted", note
    yield from _disk_rows(found.picture_bytes, found.text_bytes)
    yield "time", _seconds(done.seconds)
    yield "cache", str(done.cache)
    yield "report", str(done.report)
    yield "contact sheet", str(done.sheet)
    if done.unwritten:
        yield (
            "",
            f"no font here has the letters of {', '.join(done.unwritten)}: the sheet names them in "
            f"brackets, training reads them all the same; a font for them (Noto has most) in "
            f"~/.local/share/fonts is found",
        )
    if done.attribution:
        yield "to be said", done.attribution


def _duplicate_rows(found: Survey) -> Iterator[tuple[str, str]]:
    if found.duplicates is None:
        yield "duplicates", "not looked for: pictures are decoded at every read"
        return
    extra = sum(len(group) - 1 for group in found.duplicates)
    leak = ""
    if found.split_duplicates:
        leak = (
            f"; both trained on and held out: {found.split_duplicates:,}, which makes what is "
            f"measured on held-out pictures too good: remove the copies (--json has all), or keep "
            f"them together with data.val_group: caption, folder, or an expression on their names"
        )
    yield "duplicates", f"{extra:,}{leak}"
    for group in found.duplicates[:LISTED]:
        yield "", " = ".join(group[:LISTED]) + (" = ..." if len(group) > LISTED else "")
    if len(found.duplicates) > LISTED:
        yield "", f"and {len(found.duplicates) - LISTED:,} more groups (--json has all)"


def _disk_rows(picture_bytes: dict[int, int | None], text_bytes: int) -> Iterator[tuple[str, str]]:
    for size, count in picture_bytes.items():
        kept = "decoded at every read (data.cache_images_gb)" if count is None else _bytes(count)
        yield f"disk, {size} px", kept
    yield "disk, captions", _bytes(text_bytes)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1000:.1f} kB"


def _seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
