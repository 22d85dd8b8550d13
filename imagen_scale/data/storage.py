"""Files several processes build once: locked while built, renamed into place when whole."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from imagen_scale.files.atomic import clear_temporary, temporary_path
from imagen_scale.files.caches import cannot_write
from imagen_scale.files.locks import locked

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many
SETTING = "data.cache_dir"
PREPARATION = 3  # to be raised when prepared pictures change for the same files


def fingerprint(*parts: Any) -> str:
    """16 hex digits over `parts`, which JSON can write: the name of what is prepared from them."""
    return hashlib.sha256(json.dumps([PREPARATION, *parts]).encode()).hexdigest()[:16]


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """`locked` in the folder of prepared data.

    Raises:
        EnvironmentProblem: If the folder cannot be created or written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except OSError as error:
            raise cannot_write(path.parent, error, SETTING) from None
        yield


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears as `path` only after the block has written all of it.

    Hold `exclusive` meanwhile. Where locks do not reach other machines, each of them writes a file
    of its own, and the last one stays. What killed processes left behind is removed first.

    Raises:
        EnvironmentProblem: If the disk refuses, e.g. because it is full.
    """
    clear_temporary(path.parent, path.name)
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error, SETTING) from None
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    """What another library's error says, short enough to stand inside one of our sentences."""
    line = str(error).strip().partition("\n")[0].rstrip(". ")
    return getattr(error, "strerror", None) or line or type(error).__name__
