"""Train and sample Imagen-style text-to-image pixel cascades on the hardware people have.

    from imagen_scale import Cascade

    cascade = Cascade.load("runs/emoji_demo")
    (picture,) = cascade.sample(["red heart"], seed=0)

The names in `__all__` are public; each is imported when it is first used, so that
`import imagen_scale` itself loads neither torch nor anything else.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagen_scale.cascade import Cascade
    from imagen_scale.config import Config, load_config
    from imagen_scale.errors import ImagenScaleError

__version__ = "0.1.0"
__all__ = ["Cascade", "Config", "ImagenScaleError", "__version__", "load_config"]

_HOMES = {
    "Cascade": "imagen_scale.cascade",
    "Config": "imagen_scale.config",
    "ImagenScaleError": "imagen_scale.errors",
    "load_config": "imagen_scale.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
