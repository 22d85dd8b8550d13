"""`imagen-scale sample`."""

import re
import sys
from pathlib import Path
from typing import Any

import click

from imagen_scale.commands.console import Progress, say
from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.options import (
    run_option,
    sampling_options,
    unet_limit_option,
    unfinished_option,
)
from imagen_scale.commands.terminal import Prompt
from imagen_scale.errors import EnvironmentProblem, ImagenScaleError, UsageError, of_system
from imagen_scale.files.places import check_folder
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.options import RuntimeOptions


@click.command(short_help="Make pictures from prompts.")
@click.argument("prompts", nargs=-1, type=Prompt())
@run_option
@click.option("--from-file", type=click.Path(), help="One prompt per line.")
@click.option("--shard", help="I/N: only the I-th of every N prompts, for N commands side by side.")
@click.option("--out", help="Folder for the pictures; default samples/ in the run.")
@unet_limit_option
@unfinished_option
@user_errors
@sampling_options()
def sample(
    prompts: tuple[str, ...],
    run: str | None,
    from_file: str | None,
    shard: str | None,
    out: str | None,
    unet_limit: int | None,
    allow_unfinished: bool,
    options: SamplingOptions,
    runtime: RuntimeOptions,
) -> None:
    """Make pictures from PROMPTS with a trained run; each is written as soon as it is finished.

    \b
        imagen-scale sample "red heart" "grinning cat" --cond-scale 3 --steps 25,10
        imagen-scale sample "red heart" --negative-prompt "black outline"
        imagen-scale sample --from-file prompts.txt --shard 1/4
    """
    all_prompts = [*prompts, *(_read_prompts(from_file) if from_file else [])]
    if not all_prompts:
        raise UsageError("no prompt: give one or more in quotes, or a file with --from-file.")
    if shard:
        own = _shard(all_prompts, shard)
        if not own:  # one job of many more than there are prompts has not failed
            say(f"--shard {shard}: none of the {len(all_prompts)} prompts is left for it")
            return
        all_prompts = own
    from imagen_scale.runs.folders import find_run, samples_dir

    run_dir = find_run(run)
    from imagen_scale.files.pictures import GRID_LIMIT, save_grid, to_uint8
    from imagen_scale.sampling.folder import SampleFolder
    from imagen_scale.sampling.stage import Listener
    from imagen_scale.sampling.stages import TrainedStages

    cascade = TrainedStages.load(
        run_dir, runtime=runtime, unet_limit=unet_limit, allow_unfinished=allow_unfinished,
        say=say,
    )  # fmt: skip
    folder = Path(out) if out else samples_dir(run_dir)
    check_folder(folder)
    made = SampleFolder(folder, cascade, options)
    total = len(all_prompts) * options.num
    shown: list[tuple[str, list[Any]]] = []

    def kept() -> str:
        return f"{made.written} of {total} pictures are in {folder}"

    try:
        with Progress() as progress:
            listener = Listener(lambda unet, done, total: progress(f"U-Net {unet}", done, total))
            for picture in cascade.stream(all_prompts, options, listener):
                made.write(picture)
                progress("pictures", made.written, total)
                if len(shown) < GRID_LIMIT:
                    images = [to_uint8(image[None])[0] for image in picture.stages]
                    shown.append((picture.prompt, images))
        rows = list(zip(*(images for _, images in shown), strict=True))
        save_grid(made.grid, rows, [caption for caption, _ in shown])
    except KeyboardInterrupt:
        click.echo(f"interrupted: {kept()}", err=True)
        sys.exit(130)
    except BrokenPipeError:  # nobody reads the progress any more
        raise
    except OSError as error:
        raise EnvironmentProblem(
            f"{of_system(error)}. {kept()}; make room there, or name another folder with --out."
        ) from None
    except ImagenScaleError:
        if made.written:
            click.echo(kept(), err=True)
        raise
    which = "all of them" if len(shown) == made.written else f"the first {len(shown)}"
    click.echo(f"{made.written} pictures in {folder}, {which} in {made.grid}")


def _shard(prompts: list[str], shard: str) -> list[str]:
    """The prompts of one command of several; their seeds are those of the whole list."""
    found = re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", shard)
    if found is None or int(found[1]) > int(found[2]):
        raise UsageError(f"--shard {shard}: it should be I/N with I from 1 to N, like 1/4.")
    return prompts[int(found[1]) - 1 :: int(found[2])]


def _read_prompts(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"--from-file {path}: cannot be read: {reason}.") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"--from-file {path}: holds no prompt; write one per line.")
    return prompts
