"""`imagen-scale prepare`: everything that training reads, made ready, counted and shown."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from imagen_scale.config import Config
from imagen_scale.data.dataset import Prepared, cache_dir, prepare
from imagen_scale.data.screening import usable_source
from imagen_scale.data.storage import Progress
from imagen_scale.data.survey import Survey, survey
from imagen_scale.data.text import TextEncoder, encoder_folder
from imagen_scale.pictures import GRID_LIMIT, save_grid

TRIAL = 16  # pictures and captions that an estimate is made from
SHEET_SIDE = 256  # pictures of the contact sheet are not larger
SHEET_LINES = 3  # of caption over each
LISTED = 5  # bad pictures and duplicates named in the table; the reports have all


class Estimate(NamedTuple):
    """What preparing would take."""

    pictures: int
    distinct_captions: int
    picture_bytes: dict[int, int | None]  # by stage size; None: decoded at every read
    text_bytes: int
    seconds: float


class Preparation(NamedTuple):
    """What was prepared, and where things are."""

    survey: Survey
    seconds: float
    cache: Path
    report: Path
    sheet: Path
    attribution: str | None


def prepare_data(config: Config, sheet: Path | None, progress: Progress) -> Preparation:
    """Prepares pictures and captions, surveys them and draws a contact sheet.

    Args:
        config: The run.
        sheet: PNG file of the contact sheet; None puts it beside the data report.
        progress: Told of the work.

    Raises:
        ImagenScaleError: As `prepare`.
    """
    start = time.monotonic()
    prepared = prepare(config, progress=progress)
    found = survey(config, prepared, cache_dir(config), progress)
    sheet = sheet or prepared.report.with_name("contact_sheet.png")
    sheet.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(prepared, sheet)
    seconds = time.monotonic() - start
    return Preparation(
        found, seconds, cache_dir(config), prepared.report, sheet, prepared.source.attribution
    )


def draw_sheet(prepared: Prepared, file: Path) -> None:
    """Draws pictures from all over the data set with their captions, as training sees them.

    Args:
        prepared: The data.
        file: The PNG file; at most `GRID_LIMIT` pictures of at most `SHEET_SIDE` px.
    """
    sizes = sorted(prepared.images)
    size = max([size for size in sizes if size <= SHEET_SIDE] or sizes[:1])
    count = min(len(prepared.source), GRID_LIMIT)
    shown = [i * len(prepared.source) // count for i in range(count)]
    row = [prepared.images[size][i].transpose(1, 2, 0) for i in shown]
    save_grid(file, [row], [prepared.source.captions[i] for i in shown], lines=SHEET_LINES)


def estimate(config: Config, progress: Progress) -> Estimate:
    """What preparing would take, from a trial of a few pictures and captions.

    Pictures are checked, which decodes each once, if they have not been yet; nothing else is
    written.

    Raises:
        ImagenScaleError: As `prepare`.
    """
    source, _ = usable_source(config.data, cache_dir(config) / "images", progress)
    captions = list(dict.fromkeys(source.captions))
    count = min(len(source), TRIAL)
    trial = [i * len(source) // count for i in range(count)]
    seconds, picture_bytes = 0.0, {}
    bytes_left = round(config.data.cache_images_gb * 1e9)
    for size in config.imagen.image_sizes:
        num_bytes = len(source) * 3 * size**2
        is_stored = num_bytes <= bytes_left
        picture_bytes[size] = num_bytes if is_stored else None
        if is_stored:
            bytes_left -= num_bytes
            start = time.monotonic()
            for i in trial:
                source.image(i, size)
            seconds += (time.monotonic() - start) * len(source) / count
    progress("encoding a trial of captions", 0, 1)
    encoder = TextEncoder(encoder_folder(config.text_encoder))
    tried = captions[:: max(1, len(captions) // TRIAL)][:TRIAL]
    start = time.monotonic()
    features = encoder.encode(tried)
    seconds += (time.monotonic() - start) * len(captions) / len(tried)
    progress("encoding a trial of captions", 1, 1)
    width = 4 if config.text.store_dtype == "float32" else 2
    text_bytes = sum(one.size for one in features) * width * len(captions) // len(tried)
    return Estimate(len(source), len(captions), picture_bytes, text_bytes, seconds)


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
        f"{found.pictures:,} usable: {found.trained_on:,} to train on, {found.held_out:,} held out",
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
    yield from _disk_rows(found.picture_bytes, found.text_bytes)
    yield "time", _seconds(done.seconds)
    yield "cache", str(done.cache)
    yield "report", str(done.report)
    yield "contact sheet", str(done.sheet)
    if done.attribution:
        yield "to be said", done.attribution


def _duplicate_rows(found: Survey) -> Iterator[tuple[str, str]]:
    if found.duplicates is None:
        yield "duplicates", "not looked for: pictures are decoded at every read"
        return
    extra = sum(len(group) - 1 for group in found.duplicates)
    leak = ""
    if found.split_duplicates:
        leak = f"; both trained on and held out: {found.split_duplicates:,}"
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
