"""The average of the weights at the best validation, kept beside the newest."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagen_scale.errors import CheckpointError
from imagen_scale.files.atomic import write_atomically
from imagen_scale.runs.averages import read_best
from imagen_scale.runs.folders import best_path, best_record_path
from imagen_scale.training.ranks import from_rank_0
from imagen_scale.training.saving import Saver
from imagen_scale.training.session import Session

_COMPARE = ("measure", "samples", "pictures")  # of what only values of the same are compared


def keep_if_best(session: Session, saver: Saver, measures: dict[str, float], samples: int) -> None:
    """Saves the average if `training.keep_best` was never less; all ranks together.

    A run that goes on from a checkpoint repeats what it had measured, and keeps what it had kept.

    Args:
        session: Whose average.
        saver: Writes it; what a full disk refuses is said, and the one before stays.
        measures: Of the validation, the same on all ranks; see `validate`.
        samples: On how many; what was measured on others does not compare.
    """
    name = session.stage.training.keep_best
    if name is None or name not in measures:
        return
    number, step = session.stage.number, session.step
    record = best_record_path(saver.run_dir, number)
    now = {
        "measure": name, "value": measures[name], "step": step,
        "samples": samples, "pictures": saver.pictures,
    }  # fmt: skip
    if not measures[name] < from_rank_0(lambda: _least(record, now, saver.say)):
        return
    path = best_path(saver.run_dir, number)
    if saver.save_average(session.ema, path, step, "average of the best validation"):
        text = json.dumps(now) + "\n"
        from_rank_0(lambda: write_atomically(record, lambda new: _write(new, text)))


def _least(record: Path, now: dict[str, Any], say: Callable[[str], None]) -> float:
    """What was kept is worth; infinity where nothing was, or it was measured otherwise."""
    try:
        kept = read_best(record)
    except CheckpointError:  # not there, or damaged from outside
        return math.inf
    # None: of a version that did not write it.
    others = {key: kept[key] for key in _COMPARE if kept[key] not in (None, now[key])}
    if not others:
        return float(kept["value"])
    differs = [
        "other pictures" if key == "pictures" else f"{key} {value}, now {now[key]}"
        for key, value in others.items()
    ]
    say(
        f"training.keep_best: the best validation so far, of step {kept['step']}, does not "
        f"compare ({'; '.join(differs)}): the best is looked for from step {now['step']} on"
    )
    return math.inf


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
