"""Output that nobody takes any more: a closed terminal, a broken pipe, a log on a full disk.

What a training says is worth less than the training. Without this the first line after `ssh` has
gone, the one that says that a checkpoint is being saved, would be an exception.
"""

import io
import sys
from typing import Any, TextIO


class _Unheard(io.FileIO):
    """A stream whose writing never fails."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def outlive_listeners() -> None:
    """Makes whatever is printed from now on by this process survive the loss of its reader."""
    sys.stdout, sys.stderr = _of(sys.stdout), _of(sys.stderr)


def _of(stream: TextIO) -> TextIO:
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Unheard(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding, errors="backslashreplace", line_buffering=True,
    )  # fmt: skip
