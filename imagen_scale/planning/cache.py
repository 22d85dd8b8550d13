"""Activations and FLOPs found before, kept on disk: each takes seconds to find."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagen_scale.config import Config
from imagen_scale.planning.activations import Activations, measure, step_flops

# Raise it when the U-Net or the way of counting changes.
FORMAT = 1


def plan_dir() -> Path:
    """Where the planner keeps what it found."""
    own = os.environ.get("IMAGEN_SCALE_CACHE")
    if own is not None:
        return Path(own) / "plan"
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(cache) / "imagen-scale" / "plan"


def cached_measure(
    config: Config, unet_index: int, text_embed_dim: int, **options: Any
) -> Activations:
    """`measure`, looked up."""
    found = _cached(
        config,
        unet_index,
        text_embed_dim,
        options,
        lambda: list(measure(config, unet_index, text_embed_dim, **options)),
    )
    return Activations(*found)


def cached_flops(config: Config, unet_index: int, text_embed_dim: int, **options: Any) -> int:
    """`step_flops`, looked up."""
    return _cached(
        config,
        unet_index,
        text_embed_dim,
        options,
        lambda: step_flops(config, unet_index, text_embed_dim, **options),
    )


def _cached(
    config: Config,
    unet_index: int,
    text_embed_dim: int,
    options: dict[str, Any],
    find: Callable[[], Any],
) -> Any:
    import torch

    facts = [
        FORMAT,
        torch.__version__,
        config.imagen.image_sizes[: unet_index + 1],
        config.imagen.channels,
        config.imagen.loss_type,
        config.unets[unet_index].model_dump(mode="json"),
        config.training.precision if "micro_batch" in options else None,
        unet_index,
        text_embed_dim,
        options,
    ]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    path = plan_dir() / f"{key}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # not there, or cut by a kill: found anew
        value = find()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(value))
        temporary.replace(path)
    except OSError:
        pass  # a read-only home only costs the seconds again
    return value
