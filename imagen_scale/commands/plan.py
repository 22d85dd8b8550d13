"""`imagen-scale plan`."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from imagen_scale.commands.config import set_option
from imagen_scale.commands.console import Progress
from imagen_scale.commands.errors import user_errors
from imagen_scale.errors import UsageError
from imagen_scale.files.places import check_folder


@click.command(short_help="How much memory training will take.")
@click.option("--config", "config_path", required=True, help="JSON file of the run.")
@set_option
@click.option("--memory", help="Memory of each card, e.g. 12GB; default what this one has free.")
@click.option("--ram", help="Memory of the computer, e.g. 32GB; default what is available here.")
@click.option(
    "--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="On each machine."
)
@click.option("--machines", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--unet", type=click.IntRange(min=1), help="Plan this U-Net only.")
@click.option("--explain", is_flag=True, help="Say what was not chosen, and why.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--write", type=click.Path(), help="Folder for DeepSpeed's JSON of each U-Net.")
@user_errors
def plan(
    config_path: str,
    overrides: tuple[str, ...],
    memory: str | None,
    ram: str | None,
    gpus: int,
    machines: int,
    unet: int | None,
    explain: bool,
    as_json: bool,
    write: str | None,
) -> None:
    """Say what memory, hours and disk training will take, and choose what fits, before it starts.

    What the configuration writes is kept; what it leaves null is chosen. Exit code 1 when a stage
    does not fit.

    \b
        imagen-scale plan --config configs/cascade_64_256.json --memory 12GB --ram 32GB
    """
    from imagen_scale.config import load_config

    checked = load_config(config_path, overrides)
    card_bytes, ram_bytes = size_of("--memory", memory), size_of("--ram", ram)
    numbers = list(range(1, len(checked.unets) + 1))
    if unet is not None:
        numbers = [checked.check_number(unet, "unet")]
    if write is not None:
        check_folder(Path(write), name="write")
    from imagen_scale.planning.machine import SYSTEM_BYTES, calibration, this_machine
    from imagen_scale.planning.planner import Planner
    from imagen_scale.planning.report import as_dict, print_plan
    from imagen_scale.training.choice import budget_machine

    machine = this_machine(gpus * machines)._replace(local_ranks=gpus)
    if card_bytes is not None:
        is_other = machine.card is None  # no card here: one of today's is meant
        precision = "bf16" if is_other else machine.auto_precision
        machine = machine._replace(card=card_bytes, auto_precision=precision)
    if ram_bytes is not None:
        if ram_bytes <= SYSTEM_BYTES:
            raise UsageError(
                f"--ram {ram}: {SYSTEM_BYTES / 1e9:.0f} GB of it are the rest of the computer's; "
                f"give the whole memory of the machine."
            )
        machine = machine._replace(ram=ram_bytes - SYSTEM_BYTES)
    if card_bytes is None and (allowed := budget_machine(checked.memory, machine)) is not None:
        machine = allowed
    elif card_bytes is None:
        reason = "memory.budget is null" if checked.memory.budget is None else "there is no card"
        click.echo(
            f"{reason}: training plans nothing here, and where training.micro_batch is null it "
            f"takes the whole global batch at once. Below is what would be planned; write it down "
            f"(training.micro_batch), or name a card with --memory.",
            err=True,
        )
    ratio = calibration(machine.name)
    plans = []
    with Progress() as progress:
        for done, number in enumerate(numbers):
            progress("planning", done, len(numbers))
            plans.append(Planner(checked.stage(number), machine, ratio=ratio).plan())
    if write is not None:
        _write_deepspeed(Path(write), checked, plans)
    if as_json:
        click.echo(
            json.dumps(
                [as_dict(plan, checked.stage(plan.unet_number), machine, ratio) for plan in plans],
                indent=1,
            )
        )
    else:
        from rich.console import Console

        print_plan(
            plans, checked, machine, Console(highlight=False, soft_wrap=True),
            ratio=ratio, explain=explain,
        )  # fmt: skip
    if any(plan.fault for plan in plans):
        sys.exit(1)


def size_of(option: str, text: str | None) -> int | None:
    """Bytes that an option names, as "12GB".

    Raises:
        UsageError: Naming the option.
    """
    from imagen_scale.config import parse_bytes

    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}.") from None


def _write_deepspeed(folder: Path, checked: Any, plans: list[Any]) -> None:
    from imagen_scale.training.zero_engine import engine_config

    folder.mkdir(parents=True, exist_ok=True)
    for plan in plans:
        settings = engine_config(
            checked.stage(plan.unet_number),
            plan.choice.setup,
            plan.choice.activations.num_parameters,
        )
        path = folder / f"unet{plan.unet_number}_deepspeed.json"
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        click.echo(f"written: {path}", err=True)
