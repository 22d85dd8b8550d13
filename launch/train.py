"""Trains a cascade: deepspeed launch/train.py --config configs/cascade_64_256.json.

Also runs under torchrun, srun and plain python. Errors end in one sentence; exit code 2 for wrong
use, 1 for a failure.
"""

import os
import sys
from pathlib import Path

try:
    import click

    from imagen_scale.config import load_config
    from imagen_scale.errors import ImagenScaleError
except ModuleNotFoundError as error:
    sys.exit(
        f"error: {error}. Install the project first: pip install -c constraints.txt '.[train]'"
    )


@click.command()
@click.option("--config", "config_path", required=True, help="JSON file of the run.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one key.")
@click.option("--unet", type=click.IntRange(min=1), help="Train this U-Net only (1 is the base).")
@click.option("--run", "run_dir", help="Folder of the run; default runs/<name of the config>.")
@click.option("--resume", is_flag=True, help="Refuse to start anew if there is no run yet.")
@click.option("--fresh", is_flag=True, help="Delete the run's folder and start anew.")
@click.option(
    "--plan-check", type=click.IntRange(min=1), help="Compare memory with the plan after N steps."
)
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
    try:
        if resume and fresh:
            raise click.UsageError("--resume and --fresh exclude each other; give one.")
        config = load_config(config_path, overrides)
        folder = run_dir or config.logging.run_dir or f"runs/{Path(config_path).stem}"
        from imagen_scale.training.trainer import train  # torch and deepspeed take seconds

        train(config, Path(folder), unet_number=unet, resume=resume, fresh=fresh,
              plan_check=plan_check)  # fmt: skip
    except KeyboardInterrupt:  # before training began: nothing is lost
        sys.exit(130)
    except ImagenScaleError as error:
        if os.environ.get("RANK", "0") == "0":
            click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder that may not be written
        click.echo(f"error: {error.filename or ''}: {error.strerror or error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
