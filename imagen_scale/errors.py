"""Exceptions for everything a user, a file or a device can cause.

Each message says where, what was seen, what is allowed and what to do next. The command line
prints it without a traceback and exits with `exit_code`: 2 for wrong use, 1 for a failure.

What a message says of an option it says with `option("cond_scale")`: Python prints `cond_scale`,
the command line `--cond-scale`, the page its label.
"""

import re
from collections.abc import Callable

_MARK = "\x1f"  # the "unit separator": stands in no path and no prompt that can be typed


def option(name: str) -> str:
    """An option's place in a message, by its name in Python."""
    return f"{_MARK}{name}{_MARK}"


def spelled(message: str, spell: Callable[[str], str] = str) -> str:
    """A message with its options as one face spells them; as Python does by default."""
    return re.sub(f"{_MARK}(\\w+){_MARK}", lambda found: spell(found[1]), message)


def of_system(error: OSError) -> str:
    """What a user is told of a full disk, or a folder that may not be written."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def exit_code_of(error: BaseException) -> int:
    """What a program that an exception ends exits with."""
    return 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)


class ImagenScaleError(Exception):
    """Base class: catch this one to catch them all."""

    exit_code = 1

    @property
    def marked(self) -> str:
        """The message with its options still marked; see `spelled`."""
        return super().__str__()

    def __str__(self) -> str:
        return spelled(self.marked)


class UsageError(ImagenScaleError):
    """A command was called in a way that cannot work."""

    exit_code = 2


class ConfigError(ImagenScaleError):
    """The configuration file is not valid; the message lists every problem found."""

    exit_code = 2


class DataError(ImagenScaleError):
    """Pictures or captions are missing, unreadable or inconsistent."""

    exit_code = 2


class MissingExtraError(ImagenScaleError):
    """An optional package is needed; the message holds the command that installs it."""

    exit_code = 2


class CheckpointError(ImagenScaleError):
    """A checkpoint or inference file is missing, damaged or belongs to another run."""


class EnvironmentProblem(ImagenScaleError):
    """The machine lacks something (compiler, process group, disk); the message says what."""


class CardProblem(EnvironmentProblem):
    """A card failed: what this process begins on it after that fails too."""


class DiskProblem(EnvironmentProblem):
    """A disk is full or may not be written: what was to be saved can be saved later."""


class ShapeError(ImagenScaleError):
    """A tensor has a shape the operation does not accept."""


class ExportError(ImagenScaleError):
    """An exported graph or engine cannot be made, or not be used as it is."""


class ParityError(ExportError):
    """An exported graph computes something else than the trained network."""

    exit_code = 3
