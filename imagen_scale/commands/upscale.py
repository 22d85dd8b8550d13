"""`imagen-scale upscale`."""

from pathlib import Path
from typing import Any

import click

from imagen_scale.commands.console import Progress, say
from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.options import (
    run_option,
    sampling_options,
    seed_option,
    unfinished_option,
)
from imagen_scale.errors import UsageError
from imagen_scale.version import __version__


@click.command(short_help="Enlarge any picture.")
@click.argument("file", type=click.Path())
@run_option
@click.option("--prompt", help="What the picture shows; without it the text is left out.")
@click.option("--unet", type=int, help="Which super-resolution U-Net; default the last.")
@click.option("--tile", type=click.IntRange(min=1), help="Default the U-Net's own size.")
@click.option("--out", type=click.Path(), help="PNG file; default FILE_xN.png beside FILE.")
@seed_option
@unfinished_option
@user_errors
@sampling_options
def upscale(
    file: str,
    run: str | None,
    prompt: str | None,
    unet: int | None,
    tile: int | None,
    out: str | None,
    seed: int,
    allow_unfinished: bool,
    runtime: Any,
    settings: dict[str, Any],
    how: dict[str, Any],
) -> None:
    """Enlarge the picture FILE, of any size and shape, with a super-resolution stage.

    \b
        imagen-scale upscale photo.jpg --prompt "a lighthouse at dusk"
    """
    from imagen_scale.config import load_config
    from imagen_scale.files.atomic import sha256
    from imagen_scale.runs.folders import find_run

    run_dir = find_run(run)
    number = unet or len(load_config(run_dir / "config.json").unets)
    from imagen_scale.sampling.upscale import Upscaler, read_picture

    picture = read_picture(Path(file))
    from imagen_scale.files.pictures import save_picture, to_uint8
    from imagen_scale.sampling.runtimes.contract import Options

    upscaler = Upscaler(
        run_dir, number, allow_unfinished=allow_unfinished, tile=tile,
        runtime=runtime, options=Options(**how), say=say,
    )  # fmt: skip
    path = Path(out) if out else Path(file).with_name(f"{Path(file).stem}_x{upscaler.factor:g}.png")
    if path.suffix.lower() != ".png":
        raise UsageError(f"--out {path}: pictures are written as PNG; name it {path.stem}.png.")
    if path.exists():
        raise UsageError(f"{path}: exists already; name another file with --out.")
    with Progress() as progress:
        image, one, name = upscaler(
            picture, prompt, seed=seed, settings=settings,
            on_step=lambda unet, done, total: progress(f"U-Net {unet}", done, total),
        )  # fmt: skip
    facts = {"file": Path(file).name, "prompt": prompt, "seed": seed, "unet": number, "tile": tile,
             **one._asdict(), "runtime": name, "version": __version__,
             "model_sha256": sha256(upscaler.file.path)}  # fmt: skip
    save_picture(path, to_uint8(image[None])[0], facts)
    click.echo(f"{image.shape[2]} x {image.shape[1]} px: {path}")
