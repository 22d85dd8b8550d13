"""`imagen-scale runs`."""

import json
import time
from pathlib import Path
from typing import Any

import click

from imagen_scale.commands.errors import user_errors
from imagen_scale.errors import UsageError


@click.command(short_help="List the runs and how far they are.")
@click.option("--root", default="runs", show_default=True, help="Folder that holds the runs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@user_errors
def runs(root: str, as_json: bool) -> None:
    """List the runs: how far each stage is, its loss, and the newest picture.

    \b
        imagen-scale runs
        imagen-scale runs --json
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UsageError(
            f"{folder.resolve()}: no such folder. Train a run with `imagen-scale train "
            f"configs/emoji_demo.json`, or name the folder with --root."
        )
    from imagen_scale.runs.progress import find_runs

    found = find_runs(folder)
    if as_json:
        click.echo(json.dumps([_as_dict(run) for run in found], indent=1))
        return
    if not found:
        click.echo(f"no run under {folder.resolve()}", err=True)
        return
    from rich.console import Console

    _print(found, Console(highlight=False))


def _as_dict(run: Any) -> dict[str, Any]:
    return {
        "run": str(run.folder),
        "changed": run.changed,
        "picture": None if run.picture is None else str(run.picture),
        "problem": run.problem,
        "stages": [stage._asdict() for stage in run.stages],
    }


def _print(found: list[Any], console: Any) -> None:
    """A row for each stage, then a line for each run; piped, all in columns with tabs between."""
    from rich.markup import escape
    from rich.table import Table

    header = ("run", "stage", "step", "loss", "validation", "state", "changed", "newest picture")
    rows = []
    for run in found:
        first = (
            run.folder.name,
            _ago(run.changed),
            "" if run.picture is None else str(run.picture),
        )
        if run.problem is not None:
            reason = run.problem.partition("\n")[0]
            rows.append((first[0], "", "", "", "", f"broken: {reason}", first[1], first[2]))
        for stage in run.stages:
            rows.append(
                (
                    first[0], f"{stage.unet}: {stage.size} px", f"{stage.step}/{stage.steps}",
                    _number(stage.loss), _number(stage.val_loss), state(stage), first[1], first[2],
                )
            )  # fmt: skip
    if not console.is_terminal:
        for row in (header, *rows):
            click.echo("\t".join(row))
        return
    table = Table(*header[:-2], box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    colours = {"finished": "green", "half-trained": "yellow", "not started": "dim"}
    previous = None
    for name, *cells, _changed, _picture in rows:
        colour = colours.get(cells[-1], "red")
        cells[-1] = f"[{colour}]{cells[-1].partition(':')[0]}[/]"
        table.add_row("" if name == previous else escape(name), *cells)
        previous = name
    console.print(table)
    console.print()
    for run in found:
        said = [f"changed {_ago(run.changed)}"]
        said += [f"newest picture {run.picture}"] if run.picture is not None else []
        said += [run.problem.partition("\n")[0]] if run.problem is not None else []
        console.print(
            f"[bold]{escape(run.folder.name)}[/]: {escape(', '.join(said))}", soft_wrap=True
        )


def state(stage: Any) -> str:
    """How far a stage is, in words."""
    if stage.is_finished:
        return "finished"
    return "half-trained" if stage.step else "not started"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _ago(when: float) -> str:
    seconds = max(0.0, time.time() - when)
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // length)
        if count:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
