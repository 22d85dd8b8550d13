"""Which setup a U-Net is trained with: what is written, what the planner chose, what was learned.

`unetN/setup.json` keeps it, so that a continued run is the same run although the card has more or
less memory free today.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from imagen_scale.config import Config, MemoryConfig, StageConfig, parse_bytes
from imagen_scale.errors import EnvironmentProblem
from imagen_scale.files.atomic import write_atomically
from imagen_scale.files.kept import read_kept
from imagen_scale.models.card import has_bf16
from imagen_scale.planning.machine import Machine, calibration
from imagen_scale.planning.planner import Planner
from imagen_scale.planning.report import in_words, why
from imagen_scale.planning.setup import Setup, written_setup
from imagen_scale.runs.checkpoint import list_checkpoints
from imagen_scale.runs.folders import setup_path, unet_dir


class _Kept(NamedTuple):
    asked: dict[str, Any]  # what the setup was derived from
    setup: Setup


def choose_setup(
    stage: StageConfig, run_dir: Path, found: Machine, say: Callable[[str], None]
) -> Setup:
    """The setup in force; call it on rank 0 and tell the others.

    Args:
        stage: The U-Net.
        run_dir: The run's folder.
        found: What all ranks may count on.
        say: Told what was planned.

    Raises:
        EnvironmentProblem: If nothing fits `memory.budget`.
        ConfigError: If the batch sizes do not fit the number of processes.
    """
    asked = _asked(stage, found.ranks)
    kept = read_kept(setup_path(run_dir, stage.number), _Kept)
    if kept is not None and kept.asked == asked:
        _check_kept_precision(stage, kept.setup, found)
        return kept.setup
    machine = budget_machine(stage.memory, found)
    if machine is None:
        setup = written_setup(
            stage, found.ranks,
            on_card=found.card is not None, auto_precision=found.auto_precision,
        )  # fmt: skip
    else:
        planner = Planner(stage, machine, ratio=calibration(machine.name))
        has_checkpoints = bool(list_checkpoints(unet_dir(run_dir, stage.number)))
        before = kept.setup if kept and has_checkpoints else None
        plan = planner.plan(before)
        for warning in plan.warnings:
            say(f"warning: {warning}")
        setup = plan.choice.setup
        if plan.fault is not None:
            entry = stage.number - 1
            raise EnvironmentProblem(
                f"memory.budget {stage.memory.budget}: {stage.name} does not fit. The "
                f"nearest is {in_words(setup)}; at fault is {plan.fault}. See `imagen-scale plan "
                f"--explain`; a smaller unets.{entry}, or unets.{entry}.crop for a "
                f"super-resolution stage, needs less."
            )
        say(f"{stage.name}: planned: {in_words(setup)} ({why(plan)})")
    _write(run_dir, stage.number, asked, setup)
    return setup


def budget_machine(memory: MemoryConfig, found: Machine) -> Machine | None:
    """What `memory.budget` allows of a machine; None where nothing is to be planned."""
    budget = memory.budget
    if budget is None or (budget == "auto" and found.card is None):
        return None
    return found if budget == "auto" else found._replace(card=parse_bytes(budget))


def check_precision(config: Config) -> None:
    """Refuses bf16 on a card that would emulate it.

    Raises:
        EnvironmentProblem: Naming the card.
    """
    import torch

    if config.training.precision == "bf16" and torch.cuda.is_available() and not has_bf16():
        raise EnvironmentProblem(
            f"training.precision: bf16, but {torch.cuda.get_device_name()} was made before it and "
            f"would emulate it, many times slower. Set it to fp16, or to auto: --set "
            f"training.precision=auto."
        )


def _check_kept_precision(stage: StageConfig, kept: Setup, found: Machine) -> None:
    """Refuses to go on in bf16, which "auto" took elsewhere, on a card that would emulate it.

    Raises:
        EnvironmentProblem: With what to do.
    """
    is_of_auto = kept.precision == "bf16" and stage.training.precision == "auto"
    if is_of_auto and found.card is not None and found.auto_precision == "fp16":
        raise EnvironmentProblem(
            f"training.precision: auto took bf16 where {stage.name} was begun, and this card "
            f"({found.name}) was made before it and would emulate it, many times slower. Go on on "
            f"a card that has it, or in fp16 from here on: --set training.precision=fp16."
        )


def smaller(setup: Setup) -> Setup | None:
    """The same setup with half the micro-batch or less and the same global batch.

    None when it cannot be smaller.
    """
    share = setup.micro_batch * setup.accumulation
    if setup.micro_batch == 1 or setup.in_backward:
        return None
    micro_batch = next(b for b in range(setup.micro_batch // 2, 0, -1) if share % b == 0)
    return setup._replace(micro_batch=micro_batch, accumulation=share // micro_batch)


def keep_setup(stage: StageConfig, run_dir: Path, setup: Setup) -> None:
    """Keeps a setup that was found by running out of memory."""
    _write(run_dir, stage.number, _asked(stage, setup.ranks), setup)


def _asked(stage: StageConfig, ranks: int) -> dict[str, Any]:
    """All that a setup is derived from, except the machine."""
    asked = {
        "ranks": ranks,
        "memory": stage.memory.model_dump(mode="json"),
        "training": {
            "global_batch": stage.global_batch,
            "micro_batch": stage.micro_batch,
            "optimizer": stage.optimizer,
            "precision": stage.training.precision,
        },
        "grad_clip": stage.training.grad_clip,
        "zero": stage.zero_optimization,
        "unet": stage.unet.model_dump(mode="json"),
    }
    if stage.training.compile:  # else it stays unsaid, as in what was kept before
        asked["compile"] = True
    return json.loads(json.dumps(asked))


def _write(run_dir: Path, unet_number: int, asked: dict[str, Any], setup: Setup) -> None:
    text = json.dumps({"asked": asked, "setup": setup._asdict()}, indent=1)
    write_atomically(setup_path(run_dir, unet_number), lambda temporary: temporary.write_text(text))
