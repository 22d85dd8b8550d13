"""The JSON files of a run as a report needs them: known keys checked, others passed over.

These are written by other parts of the program, perhaps in another version of it.
"""

import json
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from imagen_scale.config.strict_json import parse_json

MOST_STEPS = 10**12  # of a line that means what it says
LARGEST = 1e30  # what is larger is drawn no better than infinity


class Record(BaseModel):
    """What is read of one file."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Skip(Record):
    """A picture that was left out."""

    picture: str
    reason: str


class DataReport(Record):
    """data_report.json."""

    source: str
    path: str | None = None
    used: int
    skipped: list[Skip]


class Zero(Record):
    """DeepSpeed's partitioning."""

    stage: int = 0


class SetupRecord(Record):
    """How a stage is trained: setup.json's `setup`."""

    ranks: int
    micro_batch: int
    accumulation: int
    precision: str
    optimizer: str
    zero: Zero = Zero()


class SetupFile(Record):
    """setup.json."""

    setup: SetupRecord


class RestorationRecord(Record):
    """How well real pictures come back from their small copies."""

    psnr_db: float
    bicubic_psnr_db: float
    ssim: float
    bicubic_ssim: float


class ColourWordsRecord(Record):
    """Colours that captions name and pictures show."""

    asked: int
    shown: float
    real_shown: float


class DiversityRecord(Record):
    """How much pictures of one caption differ, and those of different captions."""

    seeds: int
    same_caption: float
    other_captions: float | None


class MeasuresRecord(Record):
    """The measures of one stage; None was not measured."""

    unet: int
    size: int
    retrieval_accuracy: float | None = None
    colour_mean_drift: float | None = None
    colour_std_drift: float | None = None
    x_0_error: float | None = None
    nearest_train: float | None = None
    real_nearest_train: float | None = None
    lowres_consistency_db: float | None = None
    restoration: RestorationRecord | None = None
    fid: float | None = None
    kid: float | None = None
    clip_score: float | None = None
    real_clip_score: float | None = None
    colour_words: ColourWordsRecord | None = None
    diversity: DiversityRecord | None = None


class EvaluationRecord(Record):
    """evaluation.json."""

    captions: int
    split: str
    retrieval_chance: float
    stages: list[MeasuresRecord]


class ExportedFile(Record):
    """One file of an export."""

    bytes: int


class VerificationRecord(Record):
    """What comparing an export with torch gave."""

    runtime: str
    passed: bool
    max_relative_error: float
    loop_psnr_db: float
    note: str = ""


class ExportManifest(Record):
    """manifest.json of an export."""

    format: str
    precision: str
    unet_number: int
    checkpoint_sha256: str
    checkpoint_step: int
    files: dict[str, ExportedFile]
    verification: VerificationRecord | None


class SampleFacts(Record):
    """What stands beside a sampled picture."""

    prompt: str
    seed: int


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(path: Path, kind: type[AnyRecord], problems: list[str]) -> AnyRecord | None:
    """One file, or None where it is missing or damaged.

    Args:
        path: The file; that it is not there is no problem.
        kind: What it holds.
        problems: Told if it cannot be read.
    """
    try:
        return kind.model_validate(parse_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        problems.append(f"{path}: damaged: {where or 'top level'}: {first['msg']}.")
    except (OSError, ValueError) as error:
        problems.append(f"{path}: cannot be read: {error}.")
    return None


class Metrics(NamedTuple):
    """metrics.jsonl by name: (step, value) in the order of steps."""

    last_step: int
    values: dict[str, list[tuple[int, float]]]

    def last(self, name: str) -> float | None:
        """The newest value."""
        return self.values[name][-1][1] if self.values.get(name) else None


def read_metrics(path: Path, problems: list[str]) -> Metrics:
    """The lines of a metrics file that can be read; the others are counted.

    The last line may be half written: training may be at it.
    """
    values: dict[str, list[tuple[int, float]]] = {}
    last_step = num_broken = num_infinite = 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return Metrics(0, {})
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}.")
        return Metrics(0, {})
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
            step = row["step"]
            if type(step) is not int or not 0 <= step < MOST_STEPS:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            num_broken += i < len(lines) - 1
            continue
        last_step = max(last_step, step)
        for name, value in row.items():
            if name in ("unet", "step") or type(value) not in (int, float):
                continue
            if not -LARGEST < value < LARGEST:  # nor is "not a number"
                num_infinite += 1
            else:
                values.setdefault(name, []).append((step, float(value)))
    if num_broken:
        problems.append(f"{path}: {num_broken} of {len(lines)} lines are damaged and left out.")
    if num_infinite:
        problems.append(f"{path}: {num_infinite} values are not finite and left out.")
    return Metrics(last_step, {name: sorted(points) for name, points in values.items()})
