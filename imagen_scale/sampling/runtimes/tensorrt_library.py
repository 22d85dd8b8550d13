"""TensorRT's Python package, whichever is installed."""

import importlib
from typing import Any, Literal, NamedTuple

from imagen_scale.errors import MissingExtraError

LIBRARIES: tuple[Literal["tensorrt_rtx", "tensorrt"], ...] = ("tensorrt_rtx", "tensorrt")


class Library(NamedTuple):
    """An importable TensorRT."""

    name: Literal["tensorrt_rtx", "tensorrt"]
    module: Any

    @property
    def version(self) -> str:
        """Its full version: engines are bound to it."""
        return str(self.module.__version__)


def find_library(name: str | None = None) -> Library:
    """TensorRT-RTX if it is installed, else TensorRT; or the one named.

    Raises:
        MissingExtraError: If there is none.
    """
    for candidate in LIBRARIES:
        if name in (None, candidate):
            try:
                return Library(candidate, importlib.import_module(candidate))
            except ImportError:
                continue
    raise MissingExtraError(
        f"TensorRT engines need the package {(name or LIBRARIES[0]).replace('_', '-')}; run "
        f"pip install 'imagen-scale[tensorrt]' (TensorRT-RTX, under NVIDIA's licence)."
    )


def make_logger(trt: Any) -> Any:
    """A logger that keeps errors for our messages and prints nothing."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message.strip())

    return Logger()
