"""What a page says about a run, gathered from the files that lie in it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from imagen_scale_export.manifest import read_manifest
from markupsafe import Markup

from imagen_scale.checkpoint import MANIFEST, inference_path, list_checkpoints, sha256, unet_dir
from imagen_scale.config import Config, dump_config, load_config
from imagen_scale.errors import ImagenScaleError
from imagen_scale.report.chart import Series, line_chart, number, smoothed
from imagen_scale.report.pictures import Frame, frames, newest_grid
from imagen_scale.runs import Stage, read_metrics, read_run


class Row(NamedTuple):
    """A name and what is said of it."""

    name: str
    value: str


class StagePart(NamedTuple):
    """One stage: its state, figures, curves and pictures."""

    stage: Stage
    figures: list[Row]
    charts: list[Markup]
    frames: list[Frame]
    num_frames: int  # grids there are in all


class Checkpoint(NamedTuple):
    """A checkpoint as its manifest has it."""

    name: str
    size: str
    facts: str


class Export(NamedTuple):
    """An export and how it was verified."""

    name: str
    what: str
    verified: str
    state: str  # "ok", "warning" or "problem"


class Contents(NamedTuple):
    """All that the page shows."""

    name: str
    stages: list[StagePart]
    grid: str | None
    evaluation: dict[str, Any] | None
    data: list[Row]
    left_out: list[Row]
    checkpoints: list[Checkpoint]
    exports: list[Export]
    config: str
    changed: list[Row]  # keys that are not at their default


def gather(folder: Path) -> Contents:
    """Everything about the run in `folder`.

    Raises:
        ConfigError: If the run's configuration cannot be read.
    """
    config = load_config(folder / "config.json")
    run = read_run(folder)
    data, left_out = _data(folder, config)
    return Contents(
        name=folder.resolve().name,
        stages=[_stage(folder, stage) for stage in run.stages],
        grid=newest_grid(folder),
        evaluation=_json(folder / "evaluation.json"),
        data=data,
        left_out=left_out,
        checkpoints=[one for stage in run.stages for one in _checkpoints(folder, stage.unet)],
        exports=[one for stage in run.stages for one in _exports(folder, stage.unet)],
        config=dump_config(config),
        changed=_changed(config),
    )


def _stage(folder: Path, stage: Stage) -> StagePart:
    rows = read_metrics(folder, stage.unet)

    def points(name: str) -> list[tuple[float, float]]:
        return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]

    loss, val_loss = points("loss"), points("val_loss")
    rate, memory, lr = points("images_per_s"), points("peak_memory_gib"), points("lr")
    charts = [
        line_chart(
            "Loss", "mean over pictures",
            [Series("each report", "raw", loss), Series("smoothed", "main", smoothed(loss)),
             Series("validation", "second", val_loss)],
        ),
        line_chart("Throughput", "images/s", [Series("images/s", "main", rate)], zero=True),
        line_chart("Memory", "peak, GiB", [Series("GiB", "main", memory)], zero=True),
        line_chart("Learning rate", "", [Series("rate", "main", lr)], zero=True),
        line_chart(
            "Gradient", "norm before clipping", [Series("norm", "main", points("grad_norm"))]
        ),
    ]  # fmt: skip
    figures = [Row("steps", f"{stage.step:,} of {stage.steps:,}")]
    if loss:
        figures.append(Row("loss, smoothed", number(smoothed(loss)[-1][1])))
    if val_loss:
        figures.append(Row("validation loss", number(val_loss[-1][1])))
    if rate:
        figures.append(Row("images/s, median", number(sorted(y for _, y in rate)[len(rate) // 2])))
    if memory:
        figures.append(Row("peak memory", f"{max(y for _, y in memory):.2f} GiB"))
    shown, total = frames(folder, stage.unet)
    return StagePart(stage, figures, [chart for chart in charts if chart], shown, total)


def _data(folder: Path, config: Config) -> tuple[list[Row], list[Row]]:
    report = _json(folder / "data_report.json")
    if report is None:
        return [], []
    skipped = report.get("skipped") or []
    rows = [
        Row("source", str(report.get("source", ""))),
        Row("path", str(report.get("path") or "-")),
        Row("pictures used", f"{report.get('used', 0):,}"),
        Row("left out", f"{len(skipped):,}"),
        Row("held out", f"{config.data.val_fraction:.1%}"),
        Row("text encoder", config.text_encoder),
    ]
    reasons = Counter(str(one.get("reason", "")) for one in skipped if isinstance(one, dict))
    return rows, [Row(f"{count:,}", reason) for reason, count in reasons.most_common(20)]


def _checkpoints(folder: Path, unet_number: int) -> list[Checkpoint]:
    found = []
    for path in list_checkpoints(unet_dir(folder, unet_number)):
        manifest = _json(path / MANIFEST)
        name = f"unet{unet_number}/{path.name}"
        if manifest is None:
            found.append(Checkpoint(name, "", "damaged: no manifest"))
            continue
        size = sum(file["bytes"] for file in manifest["files"].values())
        facts = (
            f"{manifest.get('processes', 1)} process(es), ZeRO {manifest.get('zero_stage', 0)}, "
            f"{manifest.get('optimizer', '')}, {len(manifest['files'])} hashed files"
        )
        found.append(Checkpoint(name, _bytes(size), facts))
    path = inference_path(folder, unet_number)
    if path.is_file():
        name = f"unet{unet_number}/{path.name}"
        found.append(Checkpoint(name, _bytes(path.stat().st_size), "EMA weights, for sampling"))
    return found


def _exports(folder: Path, unet_number: int) -> list[Export]:
    found = []
    weights = inference_path(folder, unet_number)
    digest = sha256(weights) if weights.is_file() else None
    for path in sorted((folder / "export" / f"unet{unet_number}").glob("*/manifest.json")):
        name = f"unet{unet_number}/{path.parent.name}"
        try:
            manifest = read_manifest(path.parent)
        except ImagenScaleError as error:
            found.append(Export(name, "", str(error), "problem"))
            continue
        size = _bytes(sum(record.bytes for record in manifest.files.values()))
        what = f"{manifest.format}, {manifest.precision}, step {manifest.checkpoint_step:,}, {size}"
        result, state = manifest.verification, "ok"
        if result is None:
            verified, state = "not compared with the network (--no-verify)", "warning"
        else:
            state = "ok" if result.passed else "problem"
            verified = (
                f"{result.runtime}: one evaluation within {result.max_relative_error:.1e}, 20 "
                f"steps within {result.loop_max_levels:.3f}/255, {result.loop_psnr_db:.0f} dB"
            )
        if manifest.checkpoint_sha256 != digest:
            verified, state = f"made from other weights than those here; {verified}", "warning"
        found.append(Export(name, what, verified, state))
    return found


def _changed(config: Config) -> list[Row]:
    """What was written differently from the defaults, a line for each key."""
    rows = []

    def walk(path: str, value: Any, default: Any) -> None:
        if isinstance(value, dict) and isinstance(default, dict):
            for key, inner in value.items():
                walk(f"{path}.{key}".lstrip("."), inner, default.get(key))
        elif path == "unets":
            blank = type(config.unets[0])().model_dump(mode="json")
            for i, unet in enumerate(value):
                walk(f"unets.{i}", unet, blank)
        elif value != default:
            rows.append(Row(path, json.dumps(value, ensure_ascii=False)))

    fields = type(config).model_fields
    defaults = {
        name: field.get_default(call_default_factory=True) for name, field in fields.items()
    }
    plain = {
        name: value.model_dump(mode="json") if hasattr(value, "model_dump") else value
        for name, value in defaults.items()
    }
    plain["imagen"] = {
        name: field.default for name, field in type(config.imagen).model_fields.items()
    }
    walk("", config.model_dump(mode="json"), plain)
    return rows


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"
