"""evaluation.json as rows of a table."""

from collections.abc import Callable
from typing import NamedTuple

from imagen_scale.runs.records import EvaluationRecord, MeasuresRecord

Value = Callable[[MeasuresRecord], float | None]


class Row(NamedTuple):
    """One measure of every stage; "" was not measured."""

    name: str  # indented where it stands for comparison with the row above
    better: str
    cells: list[str]


def rows(evaluation: EvaluationRecord) -> list[Row]:
    """The measures that at least one stage has."""
    table: list[tuple[str, str, str, Value]] = [
        (f"retrieval (chance {evaluation.retrieval_chance:.1%})", "higher", ".1%",
         lambda stage: stage.retrieval_accuracy),
        ("colour drift of the mean, of 255", "0", "+.1f",
         lambda stage: _times(stage.colour_mean_drift, 255)),
        ("colour drift of the spread, of 255", "0", "+.1f",
         lambda stage: _times(stage.colour_std_drift, 255)),
        (_colours_asked(evaluation), "higher", ".1%",
         _part("colour_words", "shown")),
        ("  of the real pictures", "", ".1%",
         _part("colour_words", "real_shown")),
        ("error of the predicted picture", "lower", ".4f", lambda stage: stage.x_0_error),
        ("distance to the nearest training picture, of 255", "", ".1f",
         lambda stage: _times(stage.nearest_train, 255)),
        ("  of the real pictures", "", ".1f",
         lambda stage: _times(stage.real_nearest_train, 255)),
        ("difference between seeds, of 255", "", ".1f",
         _part("diversity", "same_caption", 255)),
        ("  between captions", "", ".1f",
         _part("diversity", "other_captions", 255)),
        ("keeps to its low-resolution input, dB", "higher", ".2f",
         lambda stage: stage.lowres_consistency_db),
        ("restores real pictures, PSNR in dB", "higher", ".2f",
         _part("restoration", "psnr_db")),
        ("  bicubic", "", ".2f",
         _part("restoration", "bicubic_psnr_db")),
        ("restores real pictures, SSIM", "higher", ".4f",
         _part("restoration", "ssim")),
        ("  bicubic", "", ".4f",
         _part("restoration", "bicubic_ssim")),
        ("FID", "lower", ".2f", lambda stage: stage.fid),
        ("KID x 1000", "lower", ".2f", lambda stage: _times(stage.kid, 1000)),
        ("CLIP score", "higher", ".2f", lambda stage: stage.clip_score),
        ("  of the real pictures", "", ".2f", lambda stage: stage.real_clip_score),
    ]  # fmt: skip
    made = []
    for name, better, form, value in table:
        values = [value(stage) for stage in evaluation.stages]
        cells = ["" if one is None else f"{one:{form}}" for one in values]
        if any(cells):
            made.append(Row(name, better, cells))
    return made


def _colours_asked(evaluation: EvaluationRecord) -> str:
    asked = [stage.colour_words.asked for stage in evaluation.stages if stage.colour_words]
    return f"colours that captions name ({asked[0] if asked else 0}) are shown"


def _part(name: str, field: str, factor: float = 1) -> Value:
    """One number of a group of measures, where the stage has that group."""
    return lambda stage: _times(getattr(getattr(stage, name), field, None), factor)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value
