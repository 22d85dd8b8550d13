"""An evaluation as a dictionary for files and as a table for people."""

from typing import Any

from rich.console import Console
from rich.table import Table

from imagen_scale.evaluation.measurement import Evaluation, StageMeasures


def as_dict(result: Evaluation) -> dict[str, Any]:
    """The evaluation as JSON can hold it; what was not measured is null."""
    return {
        "captions": result.captions,
        "cut_captions": result.cut_captions,
        "retrieval_chance": result.retrieval_chance,
        "stages": [_plain(stage) for stage in result.stages],
    }


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(field) for name, field in value._asdict().items()}
    return value


def print_table(result: Evaluation, console: Console) -> None:
    """Prints a row for each measure and a column for each stage."""
    table = Table("measure", box=None, pad_edge=False, header_style="bold")
    for stage in result.stages:
        table.add_column(f"U-Net {stage.unet}, {stage.size} px", justify="right")
    table.add_column("better")
    for name, better, cells in _rows(result):
        if any(cells):
            table.add_row(name, *cells, better)
    console.print(table)


def _rows(result: Evaluation) -> list[tuple[str, str, list[str]]]:
    def row(name: str, better: str, cell: Any) -> tuple[str, str, list[str]]:
        return name, better, [cell(stage) for stage in result.stages]

    return [
        row(
            f"retrieval (chance {result.retrieval_chance:.1%})",
            "higher",
            lambda stage: f"{stage.retrieval_accuracy:.1%}",
        ),
        row(
            "colour drift of the mean, of 255",
            "0",
            lambda stage: f"{255 * stage.colour_mean_drift:+.1f}",
        ),
        row(
            "colour drift of the spread, of 255",
            "0",
            lambda stage: f"{255 * stage.colour_std_drift:+.1f}",
        ),
        row(
            "error of the predicted picture", "lower", lambda stage: _number(stage.x_0_error, ".4f")
        ),
        row(
            "distance to the nearest training picture, of 255",
            "",
            lambda stage: _number(_times(stage.nearest_train, 255), ".1f"),
        ),
        row(
            "  of the real pictures",
            "",
            lambda stage: _number(_times(stage.real_nearest_train, 255), ".1f"),
        ),
        row("keeps to its low-resolution input, dB", "higher", _consistency),
        row("restores real pictures, PSNR in dB", "higher", lambda stage: _restored(stage, 0)),
        row("  bicubic", "", lambda stage: _restored(stage, 1)),
        row("restores real pictures, SSIM", "higher", lambda stage: _restored(stage, 2)),
        row("  bicubic", "", lambda stage: _restored(stage, 3)),
        row("FID", "lower", lambda stage: _number(stage.fid, ".2f")),
        row("KID x 1000", "lower", lambda stage: _number(_times(stage.kid, 1000), ".2f")),
        row("CLIP score", "higher", lambda stage: _number(stage.clip_score, ".2f")),
        row("  of the real pictures", "", lambda stage: _number(stage.real_clip_score, ".2f")),
    ]


def _consistency(stage: StageMeasures) -> str:
    return _number(stage.lowres_consistency_db, ".2f")


def _restored(stage: StageMeasures, field: int) -> str:
    value = None if stage.restoration is None else stage.restoration[field]
    return _number(value, ".2f" if field < 2 else ".4f")


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
