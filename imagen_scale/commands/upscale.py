"""`imagen-scale upscale`."""

import os
from pathlib import Path

import click

from imagen_scale.commands.console import Progress, say
from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.options import (
    run_option,
    sampling_options,
    unfinished_option,
)
from imagen_scale.commands.terminal import Prompt
from imagen_scale.errors import UsageError
from imagen_scale.files.places import check_place
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.version import __version__


@click.command(short_help="Enlarge any picture.")
@click.argument("file", type=click.Path())
@run_option
@click.option(
    "--prompt", type=Prompt(), help="What the picture shows; without it the text is left out."
)
@click.option("--unet", type=int, help="Which super-resolution U-Net; default the last.")
@click.option("--out", type=click.Path(), help="PNG file; default FILE_xN.png beside FILE.")
@unfinished_option
@user_errors
@sampling_options("num", "negative_prompt", "at_once")
def upscale(
    file: str,
    run: str | None,
    prompt: str | None,
    unet: int | None,
    out: str | None,
    allow_unfinished: bool,
    options: SamplingOptions,
    runtime: RuntimeOptions,
) -> None:
    """Enlarge the picture FILE, of any size and shape, with a super-resolution stage.

    \b
        imagen-scale upscale photo.jpg --prompt "a lighthouse at dusk"
    """
    from imagen_scale.config import load_config
    from imagen_scale.files.atomic import sha256
    from imagen_scale.runs.folders import config_path, find_run

    run_dir = find_run(run)
    config = load_config(config_path(run_dir))
    number = len(config.unets) if unet is None else config.check_number(unet, "unet")
    from imagen_scale.sampling.upscale import Upscaler, read_picture

    picture = read_picture(Path(file))
    from imagen_scale.files.picture_files import save_new_picture
    from imagen_scale.files.pictures import to_uint8
    from imagen_scale.sampling.stage import Listener

    upscaler = Upscaler(run_dir, number, runtime, allow_unfinished=allow_unfinished, say=say)
    path = Path(out) if out else Path(file).with_name(f"{Path(file).stem}_x{upscaler.factor:g}.png")
    if path.suffix.lower() != ".png":
        raise UsageError(f"--out {path}: pictures are written as PNG; name it {path.stem}.png.")
    check_place(path)
    for one in (path, path.with_suffix(".json")):
        if one.exists():
            raise UsageError(f"{one}: exists already; name another file with --out.")
    with Progress() as progress:
        listener = Listener(lambda unet, done, total: progress(f"U-Net {unet}", done, total))
        done = upscaler(picture, prompt, options, listener)
    facts = {
        # Linux allows names to be any bytes.
        "file": os.fsencode(Path(file).name).decode("utf-8", "backslashreplace"), "prompt": prompt,
        "not_read": [lost._asdict() for lost in done.not_read], "seed": options.seed,
        "unet": number, "tile": options.tile, **done.settings.model_dump(),
        "runtime": done.runtime, "version": __version__,
        "model_sha256": sha256(upscaler.file.path),
    }  # fmt: skip
    wanted, path = path, save_new_picture(path, to_uint8(done.image[None])[0], facts)
    if path != wanted:
        say(f"{wanted} was written by another call meanwhile; it is left as it is")
    click.echo(f"{done.image.shape[2]} x {done.image.shape[1]} px: {path}")
