"""An evaluation as a dictionary for files and as a table for people."""

from typing import Any

from rich.console import Console
from rich.table import Table

from imagen_scale.evaluation.measurement import Evaluation
from imagen_scale.report.measures import rows
from imagen_scale.runs.records import EvaluationRecord


def as_dict(result: Evaluation) -> dict[str, Any]:
    """The evaluation as JSON can hold it; what was not measured is null."""
    return {
        "captions": result.captions,
        "cut_captions": result.cut_captions,
        "retrieval_chance": result.retrieval_chance,
        "known": result.known,
        "stages": [_plain(stage) for stage in result.stages],
    }


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(field) for name, field in value._asdict().items()}
    return value


def print_table(facts: dict[str, Any], console: Console) -> None:
    """Prints evaluation.json: a row for each measure and a column for each stage."""
    evaluation = EvaluationRecord.model_validate(facts)
    table = Table("measure", box=None, pad_edge=False, header_style="bold")
    for stage in evaluation.stages:
        table.add_column(f"U-Net {stage.unet}, {stage.size} px", justify="right")
    table.add_column("better")
    for row in rows(evaluation):
        table.add_row(row.name, *row.cells, row.better)
    console.print(table)
