"""Pictures as text inside the page."""

import base64
import io
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from imagen_scale.files.numbers import by_number
from imagen_scale.runs.folders import grid_paths, samples_dir
from imagen_scale.runs.records import SampleFacts, read_record

MOST_GRIDS = 40  # of a stage, evenly chosen over training
MOST_SAMPLES = 12
AS_IT_IS_BYTES = 200_000  # larger files are compressed anew
MOST_WIDTH = 1600


class Grid(NamedTuple):
    """Pictures drawn at a step of training."""

    step: int
    source: str  # data: address


class EmbeddedSample(NamedTuple):
    """A picture of `imagen-scale sample`."""

    source: str
    prompt: str
    seed: int


def embed(path: Path, *, width: int = MOST_WIDTH) -> str:
    """A PNG file as a data: address; large ones as WebP, at most `width` pixels wide.

    Raises:
        ValueError: If it cannot be read as a picture.
    """
    try:
        content, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            if len(content) > AS_IT_IS_BYTES or image.width > width:
                shrunk = image.convert("RGB")
                shrunk.thumbnail((width, 16 * width))
                out = io.BytesIO()
                shrunk.save(out, "WEBP", quality=88)
                content, kind = out.getvalue(), "webp"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ValueError(f"{path}: cannot be read as a PNG picture; left out here.") from None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def read_grids(run: Path, unet_number: int, problems: list[str]) -> tuple[list[Grid], int]:
    """The grids of a stage over time, and how many there are in all."""
    found = []
    for path in grid_paths(run, unet_number):
        if match := re.fullmatch(r"unet\d+_step_(\d+)\.png", path.name):
            found.append((int(match[1]), path))
    found.sort()
    grids = []
    for step, path in _spread(found, MOST_GRIDS):
        try:
            grids.append(Grid(step, embed(path)))
        except ValueError as error:
            problems.append(str(error))
    return grids, len(found)


def read_samples(run: Path, problems: list[str]) -> list[EmbeddedSample]:
    """The newest pictures made from prompts."""
    paths = [path for path in samples_dir(run).glob("*_*.png")
             if re.fullmatch(r"\d+_[0-9a-f]+\.png", path.name)]  # fmt: skip
    made = []
    for path in sorted(paths, key=by_number, reverse=True)[:MOST_SAMPLES]:
        beside = path.with_suffix(".json")
        facts = read_record(beside, SampleFacts, problems)
        if facts is None:
            if not beside.exists():
                problems.append(f"{path}: {beside.name} is missing, so its prompt is not known.")
            continue
        try:
            made.append(EmbeddedSample(embed(path, width=512), facts.prompt, facts.seed))
        except ValueError as error:
            problems.append(str(error))
    return made


def _spread(found: list[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """At most so many, evenly chosen, the first and the last among them."""
    if len(found) <= most:
        return found
    return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]
