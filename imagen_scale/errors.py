"""Exceptions for everything a user, a file or a device can cause.

Each message says where, what was seen, what is allowed and what to do next. The command line
prints it without a traceback and exits with `exit_code`: 2 for wrong use, 1 for a failure.
"""


class ImagenScaleError(Exception):
    """Base class: catch this one to catch them all."""

    exit_code = 1


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


class ShapeError(ImagenScaleError):
    """A tensor has a shape the operation does not accept."""


class ExportError(ImagenScaleError):
    """An exported graph or engine cannot be made, or not be used as it is."""


class ParityError(ExportError):
    """An exported graph computes something else than the trained network."""

    exit_code = 3
