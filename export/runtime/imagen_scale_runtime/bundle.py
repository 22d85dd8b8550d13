"""What a bundle says of itself: `bundle.json` and the numbers beside the graphs.

The main package's docs/bundle.md is the contract.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .diffusion.solvers import Level
from .errors import ExportError
from .files.atomic import sha256
from .files.inside import leads_out
from .files.system_text import is_text

BUNDLE = "bundle.json"
SCHEMA = 1  # of bundles that this version reads

# What is read of each JSON object, and its type.
Shape = Mapping[str, Any]
SCHEDULE: Shape = {"abar": list}
NULL_TEXT: Shape = {"tokens": list, "hidden": list}
FILE: Shape = {"bytes": int, "sha256": str}
TEXT: Shape = {"max_tokens": int}
SETTINGS: Shape = {
    "steps": int, "cond_scale": int | float, "sampler": str, "spacing": str, "eta": int | float,
}  # fmt: skip
STAGE: Shape = {
    "unet": int, "folder": str, "image_size": int, "channels": int, "size_divisor": int,
    "dynamic_size": bool, "max_text_len": int, "pred_type": str, "thresholding": str,
    "percentile": int | float, "lowres_time": int | None, "lowres_residual": bool,
    "few_steps": bool, "settings": SETTINGS,
}  # fmt: skip


class Conditioned(NamedTuple):
    """What denoisers take as text, for B pictures."""

    tokens: np.ndarray  # (B, max_text_len, cond_dim) float32
    hidden: np.ndarray  # (B, time_cond_dim) float32

    def where(self, kept: Sequence[bool], other: "Conditioned") -> "Conditioned":
        """Each picture's own where it is kept, else the other's."""
        keep = np.array(kept)
        return Conditioned(
            np.where(keep[:, None, None], self.tokens, other.tokens),
            np.where(keep[:, None], self.hidden, other.hidden),
        )


class Schedule:
    """A stage's noise schedule: T times, of which T - 1 is all noise.

    Args:
        abar: alpha² of each time.
    """

    def __init__(self, abar: list[float]) -> None:
        self.signal = abar

    @property
    def timesteps(self) -> int:
        """Number of diffusion steps T."""
        return len(self.signal)

    def level(self, time: int) -> Level:
        """The noise level of a time, to double precision."""
        abar = self.signal[time]
        return Level(time, abar**0.5, (1 - abar) ** 0.5)


class StageFacts:
    """One stage: its entry in `bundle.json`, and its folder.

    Args:
        folder: The bundle's.
        facts: The entry.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder / facts["folder"]
        self.facts = facts
        self.number: int = facts["unet"]
        self.size: int = facts["image_size"]
        self.is_super_resolution = facts["lowres_time"] is not None

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]

    @property
    def name(self) -> str:
        """For a sentence."""
        return f"U-Net {self.number} ({self.size} px)"

    @property
    def has_shallow(self) -> bool:
        """Whether there are graphs of the finest level alone, for `cache_interval`."""
        return (self.folder / "denoiser_unguided_shallow.onnx").is_file()

    @cached_property
    def schedule(self) -> Schedule:
        """Its noise schedule."""
        return Schedule(_read(self.folder / "schedule.json", SCHEDULE)["abar"])

    @cached_property
    def null_text(self) -> Conditioned:
        """What the branch without text is given, for one picture."""
        found = _read(self.folder / "null_text.json", NULL_TEXT)
        return Conditioned(
            np.array([found["tokens"]], np.float32), np.array([found["hidden"]], np.float32)
        )


class Bundle:
    """A bundle's folder, opened.

    Args:
        folder: With `bundle.json` in it.
        check: Whether every file's hash is compared with the one that was noted.

    Raises:
        ExportError: If it is no bundle, not whole, or of another version.
    """

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        self.folder, path = folder, folder / BUNDLE
        if not path.is_file():
            raise ExportError(
                f"{folder}: holds no {BUNDLE}. Give a folder that `imagen-scale export --bundle` "
                f"has written."
            )
        if not is_text(folder):
            raise ExportError(
                f"{folder}: ONNX Runtime opens only files whose names are UTF-8 text; rename the "
                f"folder that is not."
            )
        facts = _read(path, {"schema_version": int})
        if (schema := facts["schema_version"]) != SCHEMA:
            raise ExportError(
                f"{path}: is of schema {schema}, and this imagen-scale-runtime reads {SCHEMA}. "
                f"Take the runtime of imagen-scale {facts.get('project_version', '?')}."
            )
        _check(path, facts, {"text": TEXT, "stages": list, "files": dict})
        for record in facts["files"].values():
            _check(path, record, FILE)
        if not facts["stages"]:
            raise _damaged(path, "it has no stages")
        for stage in facts["stages"]:
            _check(path, stage, STAGE)
            _check_values(path, stage)
        if missing := sorted(set(_needed(facts["stages"])) - set(facts["files"])):
            raise _damaged(path, f"it does not list {missing[0]}")
        _check_files(folder, facts["files"], with_hash=check)
        self.text: dict[str, Any] = facts["text"]
        self.stages = [StageFacts(folder, stage) for stage in facts["stages"]]
        for stage in self.stages:
            if (stage["lowres_time"] or 0) not in range(stage.schedule.timesteps):
                raise _damaged(path, f"lowres_time is {stage['lowres_time']}")


def _needed(stages: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The files that a bundle cannot do without."""
    yield from ("text_encoder.onnx", "tokenizer.json")
    for stage in stages:
        guided = () if stage["few_steps"] else ("denoiser.onnx",)
        for name in (
            "conditioner.onnx", "denoiser_unguided.onnx", *guided, "schedule.json", "null_text.json"
        ):  # fmt: skip
            yield f"{stage['folder']}/{name}"


def _check_files(folder: Path, files: dict[str, Any], *, with_hash: bool) -> None:
    for name, record in files.items():
        path = folder / name
        if leads_out(name):
            raise ExportError(f"{folder / BUNDLE}: names {name!r}, which is outside of the bundle.")
        if not path.is_file():
            raise ExportError(f"{path}: is missing. Copy the bundle again, or export it again.")
        is_same = path.stat().st_size == record["bytes"]
        if not is_same or (with_hash and sha256(path) != record["sha256"]):
            raise ExportError(
                f"{path}: is not what was exported. Copy the bundle again, or export it again."
            )


def _read(path: Path, shape: Shape) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path}: cannot be read ({error}); export the bundle again.") from None
    _check(path, found, shape)
    return found


def _check(path: Path, found: Any, shape: Shape, where: str = "") -> None:
    """Refuses what has not the shape that is read here.

    Raises:
        ExportError: Naming the first place.
    """
    if not isinstance(found, dict):
        raise _damaged(path, f"{where or 'it'} is no JSON object")
    for name, kind in shape.items():
        if isinstance(kind, Mapping):
            _check(path, found.get(name), kind, name)
        elif not isinstance(found.get(name), kind):
            raise _damaged(path, f"{name} is {str(found.get(name))[:40]}")


def _check_values(path: Path, stage: Mapping[str, Any]) -> None:
    """Refuses a stage that says what no stage does.

    Raises:
        ExportError: Naming the first such value.
    """
    for name, holds in (
        ("image_size", stage["image_size"] > 0 and stage["size_divisor"] > 0),
        ("channels", stage["channels"] == 3),
        ("max_text_len", stage["max_text_len"] > 0),
        ("pred_type", stage["pred_type"] in ("eps", "v", "x0")),
        ("thresholding", stage["thresholding"] in ("none", "clamp", "dynamic")),
        ("percentile", 0 < stage["percentile"] <= 1),
    ):
        if not holds:
            raise _damaged(path, f"{name} is {str(stage[name])[:40]}")


def _damaged(path: Path, reason: str) -> ExportError:
    return ExportError(f"{path}: is damaged: {reason}; export the bundle again.")
