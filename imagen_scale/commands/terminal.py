"""Words to and from a terminal whose encoding is not UTF-8, as with LANG=C."""

import codecs
import io
import sys
from typing import Any

import click

from imagen_scale.files.system_text import typed


class Prompt(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """Text that was typed: UTF-8 bytes, whatever encoding the locale names."""

    name = "text"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The text; as it is where its bytes are not UTF-8, so that it is refused by its name."""
        return typed(value) if isinstance(value, str) else value


def settle_output() -> None:
    """Lets any text be printed.

    Where no encoding is named (LANG=C), in UTF-8 into files and pipes. What a terminal has no
    letter for is escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_unnamed = codecs.lookup(stream.encoding).name == "ascii" and not stream.isatty()
            encoding = "utf-8" if is_unnamed else stream.encoding
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
