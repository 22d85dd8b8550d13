"""Samples a bundle of `imagen-scale export --bundle`: no torch, no transformers, no run."""

from .cascade import Cascade, Sample
from .errors import ImagenScaleError
from .sampling.wanted import Wanted
from .version import __version__

__all__ = ["Cascade", "ImagenScaleError", "Sample", "Wanted", "__version__"]
