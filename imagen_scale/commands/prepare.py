"""`imagen-scale prepare`."""

import json
from pathlib import Path

import click

from imagen_scale.commands.config import set_option
from imagen_scale.commands.console import Progress, open_console
from imagen_scale.commands.errors import user_errors
from imagen_scale.errors import UsageError


@click.command(short_help="Check and resize pictures, encode captions.")
@click.option("--config", "config_path", required=True, help="JSON file of the run.")
@set_option
@click.option("--estimate", is_flag=True, help="Say what it would take in time and disk, and stop.")
@click.option("--sheet", type=click.Path(), help="PNG of the contact sheet; default in the cache.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@user_errors
def prepare(
    config_path: str,
    overrides: tuple[str, ...],
    estimate: bool,
    sheet: str | None,
    as_json: bool,
) -> None:
    """Check and resize pictures and encode captions, before training needs them.

    Tells what the data set is like, names what is left out, and draws a contact sheet.

    \b
        imagen-scale prepare --config configs/cascade_64_256.json --sheet sheet.png
    """
    from imagen_scale.config import load_config

    checked = load_config(config_path, overrides)
    if sheet is not None and Path(sheet).suffix.lower() != ".png":
        raise UsageError(f"--sheet {sheet}: it is written as PNG; name it {Path(sheet).stem}.png.")
    if sheet is not None and Path(sheet).exists():
        raise UsageError(f"--sheet {sheet}: exists already; name another file.")
    if sheet is not None and estimate:
        raise UsageError("--estimate prepares nothing to be shown; leave --sheet out.")
    from imagen_scale.commands import preparation
    from imagen_scale.data import trial

    console = open_console()
    with Progress() as progress:
        if estimate:
            planned = trial.estimate(checked, progress)
        else:
            done = trial.prepare_data(checked, Path(sheet) if sheet else None, progress)
    if as_json:
        facts = planned._asdict() if estimate else preparation.as_dict(done)
        click.echo(json.dumps(facts, indent=1))
    elif estimate:
        preparation.print_estimate(planned, console)
    else:
        preparation.print_preparation(done, console)
