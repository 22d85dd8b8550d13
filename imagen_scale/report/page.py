"""The page itself: what was gathered, put into `page.html`."""

import time
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from imagen_scale import __version__
from imagen_scale.checkpoint import write_atomically
from imagen_scale.report.contents import Contents, gather

FILE = "report.html"


class Measure(NamedTuple):
    """One row of the evaluation's table."""

    name: str
    better: str
    cells: list[str]


def write_report(folder: Path, path: Path | None = None) -> Path:
    """Writes the page of a run; it needs no other file and no network.

    Args:
        folder: The run's folder.
        path: The page; None writes `report.html` into the run.

    Returns:
        The page.

    Raises:
        ConfigError: If the run's configuration cannot be read.
    """
    path = path or folder / FILE
    text = render(gather(folder))
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def render(run: Contents) -> str:
    """The page as HTML; whatever a run holds is text there, never markup."""
    environment = Environment(
        loader=PackageLoader("imagen_scale.report", "."),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html").render(
        run=run,
        measures=measures(run.evaluation),
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
    )


def measures(evaluation: dict[str, Any] | None) -> list[Measure]:
    """The rows of an evaluation, without those that nothing was measured for."""
    if evaluation is None:
        return []
    chance = evaluation.get("retrieval_chance", 0.0)
    rows = (
        (f"retrieval (chance {chance:.1%})", "higher", "retrieval_accuracy", "{:.1%}", 1),
        ("colour drift of the mean, of 255", "0", "colour_mean_drift", "{:+.1f}", 255),
        ("colour drift of the spread, of 255", "0", "colour_std_drift", "{:+.1f}", 255),
        ("keeps to its low-resolution input, dB", "higher", "lowres_consistency_db", "{:.2f}", 1),
        ("restores real pictures, PSNR in dB", "higher", "restoration.psnr_db", "{:.2f}", 1),
        ("  bicubic", "", "restoration.bicubic_psnr_db", "{:.2f}", 1),
        ("restores real pictures, SSIM", "higher", "restoration.ssim", "{:.4f}", 1),
        ("  bicubic", "", "restoration.bicubic_ssim", "{:.4f}", 1),
        ("FID", "lower", "fid", "{:.2f}", 1),
        ("KID", "lower", "kid", "{:.5f}", 1),
        ("CLIP score", "higher", "clip_score", "{:.2f}", 1),
        ("  of the real pictures", "", "real_clip_score", "{:.2f}", 1),
    )
    found = []
    for name, better, key, form, factor in rows:
        values = [_at(stage, key) for stage in evaluation.get("stages", [])]
        if any(value is not None for value in values):
            cells = ["" if value is None else form.format(factor * value) for value in values]
            found.append(Measure(name, better, cells))
    return found


def _at(stage: dict[str, Any], key: str) -> Any:
    value: Any = stage
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
