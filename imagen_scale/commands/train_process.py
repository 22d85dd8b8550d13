"""What each training process runs: `deepspeed launch/train.py`, torchrun, srun, plain python."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from imagen_scale.commands.allocator import settle_allocators
from imagen_scale.commands.errors import with_flags
from imagen_scale.commands.group import refuse_empty
from imagen_scale.commands.torch_log import settle_torch_log
from imagen_scale.commands.unheard import outlive_listeners
from imagen_scale.commands.waiting import wait_asleep
from imagen_scale.errors import ImagenScaleError, UsageError, exit_code_of, of_system
from imagen_scale.files.caches import expanded, settle_caches
from imagen_scale.files.places import check_place
from imagen_scale.training.launch_variables import fill_environment, speaks_for_its_machine

OPTIONS = (
    click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one key."),
    click.option(
        "--unet", type=click.IntRange(min=1), help="Train this U-Net only (1 is the base)."
    ),
    # torchrun takes --run for an option of its own, cut short.
    click.option(
        "--run",
        "--run-dir",
        "run_dir",
        help="Folder of the run; default runs/<name of the config>.",
    ),
    click.option("--resume", is_flag=True, help="Refuse to start anew if there is no run yet."),
    click.option("--fresh", is_flag=True, help="Delete the run's folder and start anew."),
    click.option(
        "--plan-check",
        type=click.IntRange(min=1),
        help="Compare memory with the plan after N steps.",
    ),
)


def training_options(called: Callable[..., Any]) -> Callable[..., Any]:
    """The options of training beside --config, the same whoever starts it."""
    for decorate in reversed(OPTIONS):
        called = decorate(called)
    return called


def run_folder(config: Any, config_path: str, run_dir: str | None) -> Path:
    """Where a run is written."""
    written = config.logging.run_dir
    usual = Path(f"runs/{Path(config_path).stem}") if written is None else expanded(written)
    folder = usual if run_dir is None else Path(run_dir)
    check_place(folder, name="run")
    return folder


@click.command(name="train.py")
@click.option("--config", "config_path", required=True, help="JSON file of the run.")
@training_options
@click.option("--local_rank", type=int, hidden=True)  # appended by the deepspeed launcher
@click.pass_obj
def command(
    meeting: Any,
    config_path: str,
    overrides: tuple[str, ...],
    unet: int | None,
    run_dir: str | None,
    resume: bool,
    fresh: bool,
    plan_check: int | None,
    local_rank: int | None,  # which the launcher has put into the environment too
) -> None:
    """Trains every U-Net of a cascade in turn; run again, it continues where it stopped."""
    if resume and fresh:
        raise UsageError("--resume and --fresh exclude each other; give one.")
    from imagen_scale.config import load_config

    config = load_config(config_path, overrides)
    folder = run_folder(config, config_path, run_dir)
    # torch and deepspeed take seconds
    from imagen_scale.training.cascade import train
    from imagen_scale.training.meeting import Meeting

    train(config, folder, meeting or Meeting(_say), unet_number=unet, resume=resume, fresh=fresh,
          plan_check=plan_check)  # fmt: skip


def main() -> None:
    """Runs one training process, whoever started it, and exits.

    Several processes meet first: a mistake that one of them finds ends all, and is said once.
    """
    outlive_listeners()
    wait_asleep()
    settle_torch_log()
    settle_allocators()
    settle_caches()
    is_alone = False
    try:
        fill_environment()
        if is_alone := os.environ["WORLD_SIZE"] == "1":
            sys.exit(_run(None))
        from imagen_scale.training.meeting import Meeting

        met = Meeting(_say)
    except (ImagenScaleError, OSError, KeyboardInterrupt) as error:
        if is_alone or speaks_for_its_machine():
            _tell(error)
        sys.exit(exit_code_of(error))
    try:
        with met.watchdog:
            code = _run(met)
    except (ImagenScaleError, OSError, KeyboardInterrupt) as error:
        sys.exit(exit_code_of(error))  # one of the ranks has said it
    sys.exit(code)


def _run(meeting: Any) -> int:
    """Runs the command line; an exit code where there is nothing more to do, as after --help."""
    try:
        refuse_empty(command, sys.argv[1:])
        with command.make_context("train.py", sys.argv[1:], obj=meeting) as context:
            command.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        raise UsageError(f"{error.format_message().rstrip('.')}; see --help.") from None
    return 0


def _tell(error: BaseException) -> None:
    if isinstance(error, ImagenScaleError):
        _say(error.marked)
    elif isinstance(error, OSError):
        _say(of_system(error))
    else:
        click.echo("interrupted: the same command continues from the newest checkpoint", err=True)


def _say(message: str) -> None:
    click.echo(f"error: {with_flags(message)}", err=True)


if __name__ == "__main__":
    main()
