"""evaluation.json as rows of a table."""

from collections.abc import Callable
from typing import NamedTuple

from imagen_scale.runs.records import EvaluationRecord, MeasuresRecord, RestorationRecord


class Row(NamedTuple):
    """One measure of every stage; "" was not measured."""

    name: str
    better: str
    cells: list[str]


def rows(evaluation: EvaluationRecord) -> list[Row]:
    """The measures that at least one stage has."""
    chance = f"retrieval (chance {evaluation.retrieval_chance:.1%})"
    table: list[tuple[str, str, Callable[[MeasuresRecord], float | None], str]] = [
        (chance, "higher", lambda stage: stage.retrieval_accuracy, ".1%"),
        ("colour drift of the mean, of 255", "0",
         lambda stage: _times(stage.colour_mean_drift, 255), "+.1f"),
        ("colour drift of the spread, of 255", "0",
         lambda stage: _times(stage.colour_std_drift, 255), "+.1f"),
        ("error of the predicted picture", "lower", lambda stage: stage.x_0_error, ".4f"),
        ("distance to the nearest training picture, of 255", "",
         lambda stage: _times(stage.nearest_train, 255), ".1f"),
        ("the same of the real pictures, of 255", "",
         lambda stage: _times(stage.real_nearest_train, 255), ".1f"),
        ("keeps to its low-resolution input, dB", "higher",
         lambda stage: stage.lowres_consistency_db, ".2f"),
        ("restores real pictures, PSNR in dB", "higher", _restored("psnr_db"), ".2f"),
        ("bicubic, PSNR in dB", "", _restored("bicubic_psnr_db"), ".2f"),
        ("restores real pictures, SSIM", "higher", _restored("ssim"), ".4f"),
        ("bicubic, SSIM", "", _restored("bicubic_ssim"), ".4f"),
        ("FID", "lower", lambda stage: stage.fid, ".2f"),
        ("KID x 1000", "lower", lambda stage: _times(stage.kid, 1000), ".2f"),
        ("CLIP score", "higher", lambda stage: stage.clip_score, ".2f"),
    ]  # fmt: skip
    made = []
    for name, better, value, form in table:
        values = [value(stage) for stage in evaluation.stages]
        cells = ["" if one is None else f"{one:{form}}" for one in values]
        if any(cells):
            made.append(Row(name, better, cells))
    return made


def _restored(field: str) -> Callable[[MeasuresRecord], float | None]:
    def value(stage: MeasuresRecord) -> float | None:
        found: RestorationRecord | None = stage.restoration
        return None if found is None else getattr(found, field)

    return value


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value
