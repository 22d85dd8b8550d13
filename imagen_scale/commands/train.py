"""`imagen-scale train`: starts DeepSpeed's launcher with what most people would give it."""

import importlib.util
import json
import os
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import click

from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.group import INTERRUPTED
from imagen_scale.commands.train_process import run_folder, training_options
from imagen_scale.errors import MissingExtraError, UsageError, option


@click.command(short_help="Train a cascade, or continue.")
@click.argument("file", metavar="CONFIG", required=False)
@click.option("--config", "config_path", help="The same as CONFIG, as `deepspeed` is given it.")
@training_options
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    help="Processes, one for each card; default those the run was started with, else all cards. "
    "With --hostfile: of each machine.",
)
@click.option(
    "--hostfile",
    type=click.Path(path_type=Path),
    help="Train on several machines: a line `name slots=cards` for each, as DeepSpeed reads it.",
)
@click.option("--dry-run", is_flag=True, help="Print the launcher's command line and stop.")
@user_errors
def train(
    file: str | None,
    config_path: str | None,
    overrides: tuple[str, ...],
    unet: int | None,
    run_dir: str | None,
    resume: bool,
    fresh: bool,
    plan_check: int | None,
    gpus: int | None,
    hostfile: Path | None,
    dry_run: bool,
) -> None:
    """Train every U-Net of the cascade in CONFIG, a JSON file; run again, it continues.

    Ctrl-C ends all processes and waits while they save; a second one does not wait. `deepspeed
    launch/train.py` takes the same options; torchrun and srun start it too.

    \b
        imagen-scale train configs/cascade_64_256.json
        imagen-scale train configs/cascade_64_256.json --unet 2 --gpus 4
        imagen-scale train configs/emoji_demo.json --run runs/b --set training.seed=1
    """
    if (file is None) == (config_path is None):
        raise UsageError("give the JSON file of the run, once: imagen-scale train CONFIG.")
    path = str(config_path if file is None else file)
    if resume and fresh:
        raise UsageError("--resume and --fresh exclude each other; give one.")
    from imagen_scale.config import load_config

    config = load_config(path, overrides)
    if unet is not None:
        config.check_number(unet, "unet")
    folder = run_folder(config, path, run_dir)
    arguments: list[Any] = training_words(path, folder)
    arguments += [part for override in overrides for part in ("--set", override)]
    arguments += ["--unet", unet] if unet else []
    arguments += ["--resume"] if resume else []
    arguments += ["--fresh"] if fresh else []
    arguments += ["--plan-check", plan_check] if plan_check else []
    words = [str(argument) for argument in arguments]
    if hostfile is None:
        command = command_here(words, gpus, None if fresh else folder)
    else:
        command = _command_for_hosts(words, gpus, hostfile, reach=not dry_run)
    if dry_run:
        click.echo(shlex.join(command))
        return
    start(command, folder, elsewhere=hostfile is not None)


def training_words(path: str | Path, folder: Path) -> list[str]:
    """What every training process is told.

    Args:
        path: JSON file of the run.
        folder: Its folder.

    Raises:
        MissingExtraError: If DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtraError(
            "training needs DeepSpeed, which is not installed: "
            "pip install -c constraints.txt '.[train]'."
        )
    return ["--config", str(path), "--run", str(folder)]


def start(command: list[str], folder: Path, *, elsewhere: bool = False) -> NoReturn:
    """Trains, and ends this program with the launcher's exit code; see `run_launcher`."""
    sys.exit(run_launcher(command, folder, elsewhere=elsewhere))


def run_launcher(command: list[str], folder: Path, *, elsewhere: bool = False) -> int:
    """Trains, and gives the launcher's exit code; where Ctrl-C ends it, this program ends too.

    Args:
        command: The launcher's command line.
        folder: Of the run.
        elsewhere: Whether on other machines, too.
    """
    from imagen_scale.commands.hosts import carried_variables
    from imagen_scale.commands.launcher import run

    try:
        with carried_variables() if elsewhere else nullcontext(os.environ) as environment:
            return run(command, environment)
    except KeyboardInterrupt:
        click.echo(
            f"interrupted: {folder} keeps its newest checkpoint, and the same command continues "
            f"from there",
            err=True,
        )
        sys.exit(INTERRUPTED)


def command_here(words: list[str], gpus: int | None, folder: Path | None) -> list[str]:
    """The launcher's command line for this machine; with as many processes as wrote `folder`.

    Raises:
        UsageError: If fewer cards are visible than processes asked for.
    """
    from imagen_scale.commands.launcher import launcher_command, visible_cards

    cards = visible_cards()
    processes = gpus or (folder and saved_processes(folder)) or _count(cards)
    if cards is not None and processes > len(cards):
        raise UsageError(
            f"{processes} processes, but CUDA_VISIBLE_DEVICES names {len(cards)} card(s)."
        )
    return launcher_command(processes, cards, words)


def _command_for_hosts(
    words: list[str], gpus: int | None, hostfile: Path, *, reach: bool
) -> list[str]:
    """The same for all machines of a hostfile, the first of which is asked for its address."""
    from imagen_scale.commands.hosts import address_of, hosts_command
    from imagen_scale.commands.launcher import visible_cards
    from imagen_scale.training.hostfile import machines_of

    if visible_cards() is not None:
        raise UsageError(
            f"CUDA_VISIBLE_DEVICES counts for one machine only, and {option('hostfile')} gives "
            f"each its number of cards: unset it. To choose cards of each machine start "
            f"`deepspeed --hostfile {hostfile} --include worker-1:0,1@worker-2:0,1` yourself."
        )
    machines = machines_of(hostfile)
    first, *_ = machines
    name, least = min(machines.items(), key=lambda machine: machine[1])
    if gpus is not None and gpus > least:
        raise UsageError(
            f"--gpus {gpus}: {name} has slots={least} in {hostfile}; give at most so many."
        )
    return hosts_command(hostfile, address_of(first) if reach else None, gpus, words)


def saved_processes(folder: Path) -> int | None:
    """How many processes wrote the newest checkpoint of a run, which continues with as many."""
    from imagen_scale.runs.checkpoint import MANIFEST, list_checkpoints

    found = [path for stage in sorted(folder.glob("unet*")) for path in list_checkpoints(stage)[:1]]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return int(json.loads((path / MANIFEST).read_text())["processes"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _count(cards: list[str] | None) -> int:
    """Cards that may be used; one process where there is none."""
    if cards is not None:
        return len(cards)
    import torch

    return max(1, torch.cuda.device_count())
