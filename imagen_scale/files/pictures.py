"""Writing pictures: single PNG files and captioned grids."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from imagen_scale.files import lettering
from imagen_scale.files.atomic import write_atomically
from imagen_scale.files.labels import fit_labels


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


def save_png(path: Path, image: Any) -> None:
    """Writes one picture.

    Args:
        path: The PNG file.
        image: (H, W, 3) uint8.
    """
    _save(path, Image.fromarray(image))


@contextmanager
def taken_number(folder: Path, least: int = 1) -> Iterator[int]:
    """A number for a picture that nobody else takes, whoever writes into the folder meanwhile.

    Args:
        folder: Where the picture is written while the number is held.
        least: The first that comes into question.
    """
    number = max(least, next_number(folder))
    while True:
        claim = folder / f".{number:05d}"
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            number += 1
            continue
        try:
            free = next_number(folder)
            if free <= number:  # else somebody wrote one of this number before it was claimed
                yield number
                return
            number = free
        finally:
            claim.unlink(missing_ok=True)


def save_sample(folder: Path, number: int, image: Any, facts: dict[str, Any]) -> Path:
    """Writes a picture and, beside it, what it was made from.

    The name holds a number and a hash of the facts, never the prompt: prompts may hold anything.

    Args:
        folder: Where to.
        number: First part of the name.
        image: (H, W, 3) uint8.
        facts: Prompt, seed, settings, model.

    Returns:
        The PNG file; it is written last, so it never stands without its facts.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = folder / f"{number:05d}_{digest[:8]}.png"
    save_picture(path, image, facts)
    return path


def save_picture(path: Path, image: Any, facts: dict[str, Any]) -> None:
    """`save_sample` under a name of the caller's; both files, or neither."""
    text, beside = json.dumps(facts, ensure_ascii=False, indent=1) + "\n", path.with_suffix(".json")
    write_atomically(beside, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    try:
        save_png(path, image)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def save_new_picture(path: Path, image: Any, facts: dict[str, Any]) -> Path:
    """`save_picture` where nothing is overwritten, whoever has written there meanwhile.

    Args:
        path: The PNG file that is wanted; where it is taken, a number is added to its name.
        image: (H, W, 3) uint8.
        facts: What it was made from.

    Returns:
        The PNG file.
    """
    for number in itertools.count(2):
        taken = list[Path]()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for one in (path, path.with_suffix(".json")):
                one.touch(exist_ok=False)
                taken.append(one)
            save_picture(path, image, facts)
            return path
        except FileExistsError:
            _remove(taken)
            stem = path.stem if number == 2 else path.stem.rpartition("_")[0]
            path = path.with_stem(f"{stem}_{number}")
        except BaseException:
            _remove(taken)
            raise
    raise AssertionError("numbers have no end")


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def next_number(folder: Path) -> int:
    """One above the highest picture number in a folder, so that nothing is overwritten."""
    found = (
        re.match(r"(?:grid_|sheet_)?(\d+)(_[0-9a-f]+)?\.", path.name) for path in folder.iterdir()
    )
    return max((int(match[1]) for match in found if match), default=0) + 1


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
    _save(path, grid)


def _save(path: Path, image: Image.Image) -> None:
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))
