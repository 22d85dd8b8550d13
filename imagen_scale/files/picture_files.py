"""Pictures on disk: a PNG file each, and beside it what it was made from."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .atomic import write_atomically


def save_png(path: Path, image: Any) -> None:
    """Writes one picture.

    Args:
        path: The PNG file.
        image: (H, W, 3) uint8.
    """
    save_image(path, Image.fromarray(image))


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
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(2):
        taken = list[Path]()
        try:
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


def save_image(path: Path, image: Image.Image) -> None:
    """Writes one picture as PNG."""
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))
