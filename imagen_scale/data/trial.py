"""`imagen-scale prepare`: everything that training reads, made ready, counted and shown."""

import time
from pathlib import Path
from typing import NamedTuple

from imagen_scale.config import Config
from imagen_scale.data.encoder import TextEncoder, encoder_folder
from imagen_scale.data.image_store import bytes_of, stored_sizes
from imagen_scale.data.prepared import Prepared, cache_dir, prepare
from imagen_scale.data.sources.screening import usable_source
from imagen_scale.data.storage import Progress
from imagen_scale.data.survey import Survey, survey
from imagen_scale.files.lettering import missing
from imagen_scale.files.pictures import GRID_LIMIT, save_grid

TRIAL = 16  # pictures and captions that an estimate is made from
SHEET_SIDE = 256  # pictures of the contact sheet are not larger
SHEET_LINES = 3  # of caption over each


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
    unwritten: list[str]  # scripts of the sheet's captions that no font here has


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
    shown = draw_sheet(prepared, sheet)
    seconds = time.monotonic() - start
    return Preparation(
        found, seconds, cache_dir(config), prepared.report, sheet, prepared.source.attribution,
        missing(shown),
    )  # fmt: skip


def draw_sheet(prepared: Prepared, file: Path) -> list[str]:
    """Draws pictures from all over the data set with their captions, as training sees them.

    Args:
        prepared: The data.
        file: The PNG file; at most `GRID_LIMIT` pictures of at most `SHEET_SIDE` px.

    Returns:
        The captions.
    """
    sizes = sorted(prepared.images)
    size = max([size for size in sizes if size <= SHEET_SIDE] or sizes[:1])
    count = min(len(prepared.source), GRID_LIMIT)
    shown = [i * len(prepared.source) // count for i in range(count)]
    row = [prepared.images[size][i].transpose(1, 2, 0) for i in shown]
    captions = [prepared.source.captions[i] for i in shown]
    save_grid(file, [row], captions, lines=SHEET_LINES)
    return captions


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
    sizes, max_bytes = config.imagen.image_sizes, round(config.data.cache_images_gb * 1e9)
    stored = stored_sizes(sizes, len(source), max_bytes)
    for size in sizes:
        picture_bytes[size] = len(source) * bytes_of(size) if size in stored else None
        if size in stored:
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
    encoder.close()
    progress("encoding a trial of captions", 1, 1)
    width = 4 if config.text.store_dtype == "float32" else 2
    text_bytes = sum(one.size for one in features) * width * len(captions) // len(tried)
    return Estimate(len(source), len(captions), picture_bytes, text_bytes, seconds)
