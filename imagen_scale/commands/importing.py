"""`imagen-scale import` and `imagen-scale import-config`."""

from pathlib import Path

import click

from imagen_scale.commands.errors import user_errors
from imagen_scale.errors import UsageError

encoder_option = click.option(
    "--text-encoder", help="Folder or name of the text encoder, in place of the one named there."
)


@click.command("import", short_help="Turn a MinImagen training into a run.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--run", help="Folder of the run; default runs/<name of FOLDER>.")
@encoder_option
@user_errors
def import_run(folder: Path, run: str | None, text_encoder: str | None) -> None:
    """Turn MinImagen's training FOLDER (parameters/ and state_dicts/) into a run.

    The network is the same, so the same noise gives the same pictures: MinImagen's way of sampling
    is --sampler ddpm --spacing linear with as many --steps as its timesteps. Files that hold more
    than tensors are refused.

    \b
        imagen-scale import training_20260823_120000
        imagen-scale import training_20260823_120000 --run runs/old --text-encoder models/t5
    """
    if folder.is_file():
        raise UsageError(
            f"{folder}: a file; give MinImagen's training folder. Weights of imagen-pytorch are of "
            f"another network and cannot be imported; `imagen-scale import-config` turns its "
            f"parameters into a configuration."
        )
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder.")
    from imagen_scale.importing.minimagen import import_minimagen

    target = Path(run) if run else Path("runs") / folder.resolve().name
    imported = import_minimagen(folder, target, text_encoder=text_encoder)
    for number, source in enumerate(imported.sources, start=1):
        click.echo(f"U-Net {number}: {source}")
    _tell(imported.notes)
    click.echo(f"written: {imported.run}")


@click.command("import-config", short_help="Turn other trainers' parameters into a configuration.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="JSON file; default it is printed.")
@encoder_option
@user_errors
def import_config(path: Path, out: Path | None, text_encoder: str | None) -> None:
    """Turn parameters of MinImagen or imagen-pytorch in PATH into one of our JSON files.

    PATH is MinImagen's `parameters` folder, or imagen-pytorch's JSON file. What changed, and what
    has no counterpart, is noted on standard error.

    \b
        imagen-scale import-config training_20260823_120000/parameters --out old.json
        imagen-scale import-config imagen_config.json > new.json
    """
    from imagen_scale.config import dump_config
    from imagen_scale.importing.parameters import convert, read_parameters

    if out is not None and out.exists():
        raise UsageError(f"{out}: exists already; name another file with --out.")
    converted = convert(read_parameters(path), text_encoder=text_encoder)
    _tell(converted.notes)
    text = dump_config(converted.config)
    if out is None:
        click.echo(text, nl=False)
        return
    out.write_text(text, encoding="utf-8")
    click.echo(f"written: {out}", err=True)


def _tell(notes: list[str]) -> None:
    for note in notes:
        click.echo(f"note: {note}", err=True)
