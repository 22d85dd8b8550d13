"""What each training process runs: `deepspeed launch/train.py`, torchrun, srun, plain python."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from imagen_scale.commands.allocator import settle_allocators
from imagen_scale.commands.errors import with_flags
from imagen_scale.commands.waiting import wait_asleep
from imagen_scale.errors import ImagenScaleError

OPTIONS = (
    click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one key."),
    click.option(
        "--unet", type=click.IntRange(min=1), help="Train this U-Net only (1 is the base)."
    ),
    click.option("--run", "run_dir", help="Folder of the run; default runs/<name of the config>."),
    click.option("--resume", is_flag=True, help="Refuse to start anew if there is no run yet."),
    click.option("--fresh", is_flag=True, help="Delete the run's folder and start anew."),
    click.option(
        "--plan-check",
        type=click.IntRange(min=1),
        help="Compare memory with the plan after N steps.",
    ),
)


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of training beside --config, the same whoever starts it."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def run_folder(config: Any, config_path: str, run_dir: str | None) -> Path:
    """Where a run is written."""
    return Path(run_dir or config.logging.run_dir or f"runs/{Path(config_path).stem}")


@click.command()
@click.option("--config", "config_path", required=True, help="JSON file of the run.")
@training_options
@click.option("--local_rank", type=int, hidden=True)  # appended by the deepspeed launcher
def main(
    config_path: str,
    overrides: tuple[str, ...],
    unet: int | None,
    run_dir: str | None,
    resume: bool,
    fresh: bool,
    plan_check: int | None,
    local_rank: int | None,
) -> None:
    """Trains every U-Net of a cascade in turn; run again, it continues where it stopped."""
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    wait_asleep()
    settle_allocators()
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        if resume and fresh:
            raise click.UsageError("--resume and --fresh exclude each other; give one.")
        from imagen_scale.config import load_config

        config = load_config(config_path, overrides)
        from imagen_scale.training.cascade import train  # torch and deepspeed take seconds

        train(config, run_folder(config, config_path, run_dir), unet_number=unet,
              resume=resume, fresh=fresh, plan_check=plan_check)  # fmt: skip
    except ImagenScaleError as error:
        if is_first:
            click.echo(f"error: {with_flags(error.marked)}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder that may not be written
        click.echo(f"error: {error.filename or ''}: {error.strerror or error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        if is_first:
            click.echo(
                "interrupted: the same command continues from the newest checkpoint", err=True
            )
        sys.exit(130)


if __name__ == "__main__":
    main()
