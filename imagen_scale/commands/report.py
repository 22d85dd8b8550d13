"""`imagen-scale report`."""

from pathlib import Path

import click

from imagen_scale.commands.console import Progress, say
from imagen_scale.commands.errors import user_errors
from imagen_scale.errors import UsageError
from imagen_scale.files.places import check_place


@click.command(short_help="Write one page about a run.")
@click.argument("run", required=False)
@click.option("--out", type=click.Path(), help="HTML file; default report.html in the run.")
@click.option("--no-verify", is_flag=True, help="Leave checkpoints unread, which may be large.")
@user_errors
def report(run: str | None, out: str | None, no_verify: bool) -> None:
    """Write one HTML page about RUN, by default the newest under runs/.

    State of each stage, curves, pictures over time, data, checkpoints, evaluation, exports and
    configuration; it needs no network, and the run may still be in training.

    \b
        imagen-scale report runs/emoji_demo --out report.html
    """
    from imagen_scale.runs.folders import find_run

    run_dir = find_run(run)
    path = Path(out) if out else run_dir / "report.html"
    check_place(path)
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise UsageError(f"--out {path}: the page is an HTML file; name it {path.name}.html.")
    from imagen_scale.report.page import write_report

    with Progress() as progress:
        facts = write_report(run_dir, path, check=not no_verify, progress=progress)
    for problem in facts.problems:
        say(f"missing or damaged: {problem}")
    click.echo(f"written to {path}")
