"""The average of the weights at the best validation, kept beside the newest."""

import json
import math
from pathlib import Path

from imagen_scale.errors import CheckpointError
from imagen_scale.files.atomic import write_atomically
from imagen_scale.runs.averages import read_best
from imagen_scale.runs.folders import best_path, best_record_path
from imagen_scale.training.ranks import from_rank_0
from imagen_scale.training.saving import Saver
from imagen_scale.training.session import Session


def keep_if_best(session: Session, saver: Saver, measures: dict[str, float]) -> None:
    """Saves the average if `training.keep_best` was never less; all ranks together.

    A run that goes on from a checkpoint repeats what it had measured, and keeps what it had kept.

    Args:
        session: Whose average.
        saver: Writes it; what a full disk refuses is said, and the one before stays.
        measures: Of the validation, the same on all ranks; see `validate`.
    """
    name = session.stage.training.keep_best
    if name is None or name not in measures:
        return
    number, step = session.stage.number, session.step
    record = best_record_path(saver.run_dir, number)
    if not measures[name] < from_rank_0(lambda: _least(record, name)):
        return
    path = best_path(saver.run_dir, number)
    if saver.save_average(session.ema, path, step, "average of the best validation"):
        text = json.dumps({"measure": name, "value": measures[name], "step": step}) + "\n"
        from_rank_0(lambda: write_atomically(record, lambda new: _write(new, text)))


def _least(record: Path, name: str) -> float:
    """What was kept is worth; infinity where nothing was, or by another measure."""
    try:
        kept = read_best(record)
    except CheckpointError:  # not there, or damaged from outside
        return math.inf
    return kept["value"] if kept["measure"] == name else math.inf


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
