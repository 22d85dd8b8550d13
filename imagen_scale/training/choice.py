"""Which setup a U-Net is trained with: what is written, what the planner chose, what was learned.

`unetN/setup.json` keeps it, so that a continued run is the same run although the card has more or
less memory free today.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagen_scale.config import Config, parse_bytes
from imagen_scale.errors import EnvironmentProblem
from imagen_scale.files.atomic import write_atomically
from imagen_scale.planning.machine import Machine, calibration, this_machine
from imagen_scale.planning.planner import Planner
from imagen_scale.planning.report import in_words, why
from imagen_scale.planning.setup import Setup, written_setup
from imagen_scale.runs.checkpoint import list_checkpoints
from imagen_scale.runs.folders import unet_dir


def choose_setup(
    config: Config,
    run_dir: Path,
    unet_number: int,
    text_embed_dim: int,
    ranks: int,
    say: Callable[[str], None],
) -> Setup:
    """The setup in force; call it on rank 0 and tell the others.

    Raises:
        EnvironmentProblem: If nothing fits `memory.budget`.
        ConfigError: If the batch sizes do not fit the number of processes.
    """
    index = unet_number - 1
    asked, kept = _asked(config, index, ranks), _read(run_dir, unet_number)
    if kept is not None and kept["asked"] == asked:
        return _setup_of(kept["setup"])
    machine = budget_machine(config, ranks)
    if machine is None:
        setup = written_setup(config, index, ranks, on_card=_has_card())
    else:
        planner = Planner(config, index, text_embed_dim, machine, ratio=calibration(machine.name))
        has_checkpoints = bool(list_checkpoints(unet_dir(run_dir, unet_number)))
        before = _setup_of(kept["setup"]) if kept and has_checkpoints else None
        plan = planner.plan(before)
        for warning in plan.warnings:
            say(f"warning: {warning}")
        setup = plan.choice.setup
        if plan.fault is not None:
            raise EnvironmentProblem(
                f"memory.budget {config.memory.budget}: U-Net {unet_number} does not fit. The "
                f"nearest is {in_words(setup)}; at fault is {plan.fault}. See `imagen-scale plan "
                f"--explain`; a smaller unets.{index}, or unets.{index}.crop for a "
                f"super-resolution stage, needs less."
            )
        say(f"U-Net {unet_number}: planned: {in_words(setup)} ({why(plan)})")
    _write(run_dir, unet_number, asked, setup)
    return setup


def budget_machine(config: Config, ranks: int) -> Machine | None:
    """What `memory.budget` allows on this machine; None without a budget."""
    budget = config.memory.budget
    if budget is None:
        return None
    machine = this_machine(ranks)
    return machine if budget == "auto" else machine._replace(card=parse_bytes(budget))


def smaller(setup: Setup) -> Setup | None:
    """The same setup with half the micro-batch or less and the same global batch.

    None when it cannot be smaller.
    """
    share = setup.micro_batch * setup.accumulation
    if setup.micro_batch == 1 or setup.in_backward:
        return None
    micro_batch = next(b for b in range(setup.micro_batch // 2, 0, -1) if share % b == 0)
    return setup._replace(micro_batch=micro_batch, accumulation=share // micro_batch)


def remember(config: Config, run_dir: Path, unet_number: int, setup: Setup) -> None:
    """Keeps a setup that was found by running out of memory."""
    _write(run_dir, unet_number, _asked(config, unet_number - 1, setup.ranks), setup)


def _asked(config: Config, index: int, ranks: int) -> dict[str, Any]:
    """All that a setup is derived from, except the machine."""
    training = {
        key: config.per_unet("training", key, index)
        for key in ("global_batch", "micro_batch", "optimizer")
    }
    asked = {
        "ranks": ranks,
        "memory": config.memory.model_dump(mode="json"),
        "training": training | {"precision": config.training.precision},
        "grad_clip": config.training.grad_clip,
        "zero": config.deepspeed.get("zero_optimization"),
        "unet": config.unets[index].model_dump(mode="json"),
    }
    return json.loads(json.dumps(asked))


def _setup_of(fields: dict[str, Any]) -> Setup:
    return Setup(**fields | {"checkpointing": tuple(fields["checkpointing"])})


def _file(run_dir: Path, unet_number: int) -> Path:
    return unet_dir(run_dir, unet_number) / "setup.json"


def _read(run_dir: Path, unet_number: int) -> dict[str, Any] | None:
    try:
        kept = json.loads(_file(run_dir, unet_number).read_text())
        _setup_of(kept["setup"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or of another version: chosen anew
    return kept


def _write(run_dir: Path, unet_number: int, asked: dict[str, Any], setup: Setup) -> None:
    text = json.dumps({"asked": asked, "setup": setup._asdict()}, indent=1)
    write_atomically(_file(run_dir, unet_number), lambda temporary: temporary.write_text(text))


def _has_card() -> bool:
    import torch

    return torch.cuda.is_available()
