"""Pictures that were made before, by the page or by `imagen-scale sample`, newest first."""

import re
from pathlib import Path
from typing import NamedTuple

from imagen_scale.runs.records import Record, read_record
from imagen_scale.sampling.options import StageSettings

MOST_SHOWN = 60


class SampledStage(StageSettings):
    """How one stage was sampled, and what computed it."""

    # Of any version: a name that is not known here is shown all the same.
    sampler: str = "dpmpp_2m"  # type: ignore[assignment]
    spacing: str = "trailing"  # type: ignore[assignment]
    runtime: str = ""


class Facts(Record):
    """What stands beside a picture."""

    prompt: str
    negative_prompt: str | None = None
    seed: int
    tile: int | None = None
    stages: list[SampledStage]


class Entry(NamedTuple):
    """One picture."""

    path: Path
    facts: Facts


class History(NamedTuple):
    """The newest pictures of a folder."""

    entries: list[Entry]
    total: int  # in the folder
    problems: list[str]  # of those that are left out


def read_history(folder: Path) -> History:
    """The newest pictures of a folder; one whose facts are missing or damaged is left out."""
    paths = [path for path in folder.glob("*_*.png") if re.fullmatch(r"\d+_[0-9a-f]+", path.stem)]
    paths.sort(key=lambda path: (int(path.stem.partition("_")[0]), path.name), reverse=True)
    problems: list[str] = []
    entries = []
    for path in paths[:MOST_SHOWN]:
        beside = path.with_suffix(".json")
        facts = read_record(beside, Facts, problems)
        if facts is not None and facts.stages:
            entries.append(Entry(path, facts))
        elif not beside.exists():
            problems.append(f"{path}: {beside.name} is missing, so its settings are not known.")
    return History(entries, len(paths), problems)
