"""Train and sample Imagen-style text-to-image pixel cascades on the hardware people have.

`Cascade` and `Sample` bring torch with them, so they are imported when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from imagen_scale.errors import ImagenScaleError

if TYPE_CHECKING:
    from imagen_scale.api import Cascade, Sample

__version__ = "0.1.0"
__all__ = ["Cascade", "ImagenScaleError", "Sample", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("imagen_scale.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
