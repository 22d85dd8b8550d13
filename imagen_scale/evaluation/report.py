"""An evaluation as a dictionary for files and as a table for people."""

import math
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


def not_finite(result: Evaluation) -> list[str]:
    """Measures that are no finite number, as a network gives them that is not trained well."""
    return [
        f"{name} of U-Net {stage.unet}"
        for stage in result.stages
        for name, value in stage._asdict().items()
        if not _is_finite(value)
    ]


def _plain(stage: Any) -> dict[str, Any]:
    """A stage's measures; None in place of those that are not finite, which JSON cannot hold."""
    return {
        name: None if not _is_finite(value) else value._asdict() if _is_group(value) else value
        for name, value in stage._asdict().items()
    }


def _is_group(value: Any) -> bool:
    return hasattr(value, "_asdict")


def _is_finite(value: Any) -> bool:
    values = value._asdict().values() if _is_group(value) else (value,)
    return all(math.isfinite(one) for one in values if isinstance(one, float))


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
