"""Train and sample Imagen-style text-to-image pixel cascades on the hardware people have.

`Cascade` and `Sample` bring torch with them, so they are imported when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from imagen_scale.errors import ImagenScaleError
from imagen_scale.version import __version__

if TYPE_CHECKING:
    from imagen_scale.sampling.cascade import Cascade, Sample
    from imagen_scale.sampling.options import SamplingOptions

__all__ = ["Cascade", "ImagenScaleError", "Sample", "SamplingOptions", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Cascade", "Sample"):
        from imagen_scale.sampling import cascade

        return getattr(cascade, name)
    if name == "SamplingOptions":
        from imagen_scale.sampling import options

        return options.SamplingOptions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
