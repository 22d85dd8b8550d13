"""Activations and FLOPs found before, kept on disk: each takes seconds to find."""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from imagen_scale.config import StageConfig
from imagen_scale.config.distillation import FewSteps
from imagen_scale.files.atomic import temporary_path
from imagen_scale.files.caches import cache_root
from imagen_scale.files.kept import read_kept
from imagen_scale.planning.activations import Activations, measure, step_flops
from imagen_scale.planning.teacher import forward_bytes

# Raise it when the U-Net or the way of counting changes.
FORMAT = 1
Found = TypeVar("Found")
FIGURES = Path(__file__).with_name("figures.json")


def plan_dir() -> Path:
    """Where the planner keeps what it found."""
    return cache_root() / "plan"


@cache
def _shipped() -> dict[str, Any]:
    """Figures of the configurations that come with this project: benchmarks/plan_figures.py."""
    text = FIGURES.read_text() if FIGURES.exists() else "{}"
    found: dict[str, Any] = json.loads(text)
    return found


def cached_measure(stage: StageConfig, *, precision: str, **options: Any) -> Activations:
    """`measure`, looked up."""
    width = "fp32" if precision == "fp32" else "bf16"
    return _cached(
        Activations, stage, options, width, lambda: measure(stage, precision=width, **options)
    )


def cached_teacher(stage: StageConfig, few: FewSteps, *, micro_batch: int, precision: str) -> int:
    """`teacher.forward_bytes`, looked up."""
    width = "fp32" if precision == "fp32" else "bf16"
    options = {"teacher_guided": few.cond_scale != 1, "micro_batch": micro_batch}
    return _cached(
        int, stage, options, width,
        lambda: forward_bytes(stage, few, micro_batch=micro_batch, precision=width),
    )  # fmt: skip


def cached_flops(stage: StageConfig, **options: Any) -> int:
    """`step_flops`, looked up."""
    return _cached(int, stage, options, None, lambda: step_flops(stage, **options))


def _shape(stage: StageConfig) -> dict[str, Any]:
    """The keys of `unets[i]` that a step's memory and work depend on."""
    keys = stage.unet.model_dump(mode="json", exclude={"schedule"})
    if not stage.unet.lowres_residual:
        del keys["lowres_residual"]  # as before there was such a key
    return keys


def _cached(
    kind: type[Found],
    stage: StageConfig,
    options: dict[str, Any],
    precision: str | None,
    find: Callable[[], Found],
) -> Found:
    import torch

    facts = [
        FORMAT,
        torch.__version__.partition("+")[0],  # whatever it computes on: nothing is computed
        stage.imagen.image_sizes[: stage.number],
        stage.imagen.channels,
        stage.imagen.loss_type,
        _shape(stage),
        precision,
        stage.seed_index,
        stage.text_embed_dim,
        options,
    ]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    if (shipped := _shipped().get(key)) is not None:
        return TypeAdapter(kind).validate_python(shipped)
    path = plan_dir() / f"{key}.json"
    if (kept := read_kept(path, kind)) is not None:
        return kept
    value = find()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(path)
        temporary.write_text(json.dumps(value))
        temporary.replace(path)
    except OSError:
        pass  # a read-only home only costs the seconds again
    return value
