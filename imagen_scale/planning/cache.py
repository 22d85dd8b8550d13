"""Activations and FLOPs found before, kept on disk: each takes seconds to find."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagen_scale.config import StageConfig
from imagen_scale.files.atomic import temporary_path
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


def cached_measure(stage: StageConfig, **options: Any) -> Activations:
    """`measure`, looked up."""
    return Activations(*_cached(stage, options, lambda: list(measure(stage, **options))))


def cached_flops(stage: StageConfig, **options: Any) -> int:
    """`step_flops`, looked up."""
    return _cached(stage, options, lambda: step_flops(stage, **options))


def _cached(stage: StageConfig, options: dict[str, Any], find: Callable[[], Any]) -> Any:
    import torch

    facts = [
        FORMAT,
        torch.__version__.partition("+")[0],  # whatever it computes on: nothing is computed
        stage.imagen.image_sizes[: stage.number],
        stage.imagen.channels,
        stage.imagen.loss_type,
        stage.unet.model_dump(mode="json"),
        stage.training.precision if "micro_batch" in options else None,
        stage.seed_index,
        stage.text_embed_dim,
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
        temporary = temporary_path(path)
        temporary.write_text(json.dumps(value))
        temporary.replace(path)
    except OSError:
        pass  # a read-only home only costs the seconds again
    return value
