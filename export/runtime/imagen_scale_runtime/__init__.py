"""Samples a bundle of `imagen-scale export --bundle`: no torch, no transformers, no run."""

from .cascade import Cascade, Sample
from .errors import ImagenScaleError
from .version import __version__

__all__ = ["Cascade", "ImagenScaleError", "Sample", "__version__"]
