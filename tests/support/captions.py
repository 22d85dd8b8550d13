"""Forty-one captions as data sets hold them, each with what becomes of it.

Every case is a folder with a good picture and the one in question, `case.png`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

LONG = "a cat " * 1666 + "end."  # 10,000 characters
RIGHT_TO_LEFT = "قطة حمراء على شجرة"


class Case(NamedTuple):
    """How a caption is written, and its rule in the last three."""

    name: str
    write: Callable[[Path], object]  # into a folder that holds the two pictures
    used: str | None = None  # the caption that comes out
    skipped: str | None = None  # start of the reason; the picture is left out
    refused: str | None = None  # part of the message; the list as a whole is wrong


def beside(content: bytes | str) -> Callable[[Path], object]:
    """A caption file beside each picture."""
    data = content.encode() if isinstance(content, str) else content

    def write(folder: Path) -> None:
        (folder / "good.txt").write_text("a dog")
        (folder / "case.txt").write_bytes(data)

    return write


def made(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else where the caption file should be."""

    def write(folder: Path) -> None:
        (folder / "good.txt").write_text("a dog")
        make(folder / "case.txt")

    return write


def escaping(file: Path) -> None:
    outside = file.parent.with_name("outside.txt")
    outside.write_text("secret")
    file.symlink_to(outside)


def row(**columns: object) -> Callable[[Path], object]:
    """A line of metadata.jsonl."""
    return lines(json.dumps({"file_name": "case.png", **columns}))


def lines(*raw: str | bytes, end: bytes = b"\n", start: bytes = b"") -> Callable[[Path], object]:
    """metadata.jsonl with these lines after that of the good picture."""

    def write(folder: Path) -> None:
        good = json.dumps({"file_name": "good.png", "text": "a dog"})
        encoded = [line.encode() if isinstance(line, str) else line for line in (good, *raw)]
        (folder / "metadata.jsonl").write_bytes(start + end.join([*encoded, b""]))

    return write


def table(text: str) -> Callable[[Path], object]:
    """metadata.csv."""
    return lambda folder: (folder / "metadata.csv").write_bytes(text.encode())


RED_CAT = json.dumps({"file_name": "case.png", "text": "a red\r\ncat"})
CASES = [
    Case("no file", made(lambda file: None), skipped="has no caption"),
    Case("empty", beside(""), skipped="the caption is empty"),
    Case("blanks", beside(" \t\r\n \u3000"), skipped="the caption is empty"),
    Case("byte-order mark only", beside("\ufeff"), skipped="the caption is empty"),
    Case("zero-width only", beside("\u200b\u2060"), skipped="the caption is empty"),
    Case("control characters only", beside("\x00\x07\x1b"), skipped="the caption is empty"),
    Case("NUL inside", beside("a\x00cat"), used="a cat"),
    Case("escape sequence", beside("a \x1b[31mred\x1b[0m cat"), used="a [31mred [0m cat"),
    Case("tabs and lines", beside("\ta  red\n\ncat\n"), used="a red cat"),
    Case("Windows lines", beside("a red\r\ncat\r\n"), used="a red cat"),
    Case("old Mac lines", beside("a red\rcat\r"), used="a red cat"),
    Case("byte-order mark", beside("\ufeffa cat"), used="a cat"),
    Case("byte-order mark inside", beside("a\ufeffcat"), used="a cat"),
    Case("10,000 characters", beside(LONG), used=LONG),
    Case("a million characters", beside("a" * (2**20 + 1)), skipped="its caption file case.txt: h"),
    Case("UTF-16", beside("a cat".encode("utf-16")), skipped="its caption file case.txt: is not"),
    Case("Latin-1", beside("größe".encode("latin-1")), skipped="its caption file case.txt: is not"),
    Case("cut UTF-8", beside("größe".encode()[:3]), skipped="its caption file case.txt: is not"),
    Case("half a pair in UTF-8", beside(b"\xed\xa0\x80"), skipped="its caption file case.txt: is"),
    Case("right to left", beside(RIGHT_TO_LEFT), used=RIGHT_TO_LEFT),
    Case("direction override", beside("a \u202etac\u202c"), used="a \u202etac\u202c"),
    Case("joined emoji", beside("👩\u200d🚀 flies"), used="👩\u200d🚀 flies"),
    Case("separate accents", beside("cafe\u0301"), used="cafe\u0301"),
    Case("no blanks", beside("红猫" * 200), used="红猫" * 200),
    Case("same as another's", beside("a dog"), used="a dog"),
    Case("folder", made(Path.mkdir), skipped="its caption file case.txt: is a folder"),
    Case("named pipe", made(os.mkfifo), skipped="its caption file case.txt: is no regular file"),
    Case("link outside", made(escaping), skipped="its caption file case.txt: is reached through"),
    Case("no column", row(), skipped="the caption is missing"),
    Case("null", row(text=None), skipped="the caption is missing"),
    Case("number", row(text=3), skipped="the caption is a int, not text"),
    Case("list", row(text=["a", "cat"]), skipped="the caption is a list, not text"),
    Case("half a pair in JSON", row(text="a \ud800"), skipped="the caption holds a broken char"),
    Case("Windows list", lines(RED_CAT, end=b"\r\n", start=b"\xef\xbb\xbf"), used="a red cat"),
    Case("listed twice", lines(RED_CAT, RED_CAT), used="a red cat", skipped="was listed before"),
    Case("list not UTF-8", lines(b'{"text": "gr\xf6\xdfe"}'), refused="is not UTF-8 text"),
    Case("line not JSON", lines('{"file_name": "case.png"'), refused="line 2: not JSON"),
    Case("no such column", table("file_name,prompt\ncase.png,x\n"), refused="no row has the col"),
    Case("table", table('\ufefffile_name,text\r\ncase.png,"a ""red""\r\ncat"'), used='a "red" cat'),
    Case("row too long", table("file_name,text\ncase.png,1girl, solo\n"), refused="line 2: has 3"),
    Case("open quote", table('file_name,text\ncase.png,"a cat\n'), refused="not a CSV row"),
]  # fmt: skip


def write_case(case: Case, folder: Path) -> None:
    """Makes the folder of a case."""
    folder.mkdir(parents=True)
    for name in ("good.png", "case.png"):
        Image.new("RGB", (8, 8), "red").save(folder / name)
    case.write(folder)
