"""`imagen-scale report`."""

from pathlib import Path

import click

from imagen_scale.command_errors import user_errors
from imagen_scale.errors import UsageError


@click.command(short_help="Write one page about a run.")
@click.argument("run", required=False)
@click.option("--out", type=click.Path(), help="HTML file; default report.html in the run.")
@user_errors
def report(run: str | None, out: str | None) -> None:
    """Write one HTML page about RUN, by default the newest: curves, pictures, checkpoints.

    The page holds everything itself and fetches nothing: open it anywhere, send it to anyone. It
    shows loss, validation, speed and memory, the pictures drawn while training with a slider over
    time, the last evaluation, what was left out of the data, checkpoints, exports with their
    verification, and the configuration.

    \b
        imagen-scale report
        imagen-scale report runs/emoji_demo --out emoji.html
    """
    from imagen_scale.checkpoint import find_run

    folder = find_run(run)
    if out is not None and Path(out).suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: it is written as HTML; name it {Path(out).stem}.html.")
    from imagen_scale.report.page import write_report

    page = write_report(folder, Path(out) if out else None)
    click.echo(f"{page} ({page.stat().st_size / 2**20:.1f} MiB; open it in a browser)")
