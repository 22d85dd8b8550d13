"""The page: one HTML file that fetches nothing; whatever comes from files is escaped by jinja2."""

from datetime import datetime
from importlib.resources import files
from pathlib import Path

import jinja2

from imagen_scale.files.atomic import write_atomically
from imagen_scale.report.curves import Chart, draw, value_text
from imagen_scale.report.measures import rows
from imagen_scale.report.run_facts import Progress, RunFacts, StageFacts, read_run_facts
from imagen_scale.version import __version__

QUARTERS = {
    "least noise": "loss_quarter_1", "less": "loss_quarter_2", "more": "loss_quarter_3",
    "most noise": "loss_quarter_4",
}  # fmt: skip
# Charts beside the losses: title, and key by name of each curve.
SAMPLES = (
    (
        "Colour drift of the samples, levels of 255",
        {"mean": "colour_drift_mean", "spread": "colour_drift_std"},
    ),
    (
        "Super-resolution of real pictures, dB",
        {"keeps to its input": "lowres_consistency_db", "restores the original": "psnr_db"},
    ),
)
PREDICTED = "Error of the predicted picture, held out"
OTHERS = (
    ("Pictures per second", "images_per_s"),
    ("Peak memory, GiB", "peak_memory_gib"),
    ("Learning rate", "lr"),
)


def write_report(run: Path, out: Path, *, check: bool, progress: Progress) -> RunFacts:
    """Writes the page of a run.

    Args:
        run: The run's folder.
        out: The HTML file; an earlier one is replaced.
        check: As for `read_run`.
        progress: Told of the work.

    Returns:
        What was read, `problems` among it.
    """
    facts = read_run_facts(run, check=check, progress=progress)
    # File names may hold what is no text.
    content = render(facts).encode("utf-8", "backslashreplace")
    write_atomically(out, lambda temporary: temporary.write_bytes(content))
    return facts


def render(facts: RunFacts) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("imagen_scale.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size_text, "value": value_text}
    folder = files("imagen_scale.report")
    return environment.get_template("page.html").render(
        run=facts,
        charts={stage.number: charts(stage) for stage in facts.stages},
        measures=rows(facts.evaluation) if facts.evaluation else [],
        version=__version__,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
    )


def charts(stage: StageFacts) -> list[Chart]:
    """The curves of one stage; those without a point are left out."""
    values = stage.metrics.values
    losses = {name: values.get(key, [])
              for name, key in (("loss", "loss"), ("validation loss", "val_loss"))}  # fmt: skip
    drawn = [
        draw("Loss", losses),
        draw("Loss in each quarter of the log-SNR",
             {name: values.get(key, []) for name, key in QUARTERS.items()}),
        *(draw(title, {name: values.get(key, []) for name, key in curves.items()})
          for title, curves in SAMPLES),
        draw(PREDICTED, {PREDICTED: values.get("val_x_0_error", [])}),
        *(draw(title, {title: values.get(key, [])}, from_zero=True) for title, key in OTHERS),
    ]  # fmt: skip
    return [chart for chart in drawn if chart is not None]


def size_text(count: int) -> str:
    """Bytes for people, in powers of ten."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
