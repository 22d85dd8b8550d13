"""A plan in words, tables and JSON."""

from typing import Any

from rich.console import Console
from rich.table import Table

from imagen_scale.config import Config, StageConfig
from imagen_scale.planning.hours import SHARE, cards_for, disk_left, hours
from imagen_scale.planning.machine import Machine
from imagen_scale.planning.planner import Candidate, UnetPlan
from imagen_scale.planning.setup import WHOLE_MATRICES, Setup
from imagen_scale.planning.words import gb

TERMS = ("weights", "gradients", "optimizer", "ema", "activations", "buckets", "workspace")


def as_dict(plan: UnetPlan, stage: StageConfig, machine: Machine, ratio: float) -> dict[str, Any]:
    """One U-Net's plan for scripts; bytes."""
    candidate = plan.choice
    return {
        "unet": plan.unet_number,
        "fits": plan.fault is None,
        "fault": plan.fault,
        "warnings": plan.warnings,
        "parameters": candidate.activations.num_parameters,
        "setup": candidate.setup._asdict(),
        "global_batch": candidate.setup.global_batch,
        "bytes": {
            **candidate.cost._asdict(),
            "card": int(candidate.cost.card * ratio),
            # Of one machine, as the table has it; `host` is of all processes together.
            "host_of_a_machine": _host(candidate, machine, ratio),
            "activations_held": candidate.activations.held,
            "disk_left": disk_left(candidate.cost, candidate.activations.num_parameters, stage),
        },
        "predicted_hours": {
            card.name: round(hours(candidate, stage, card, machine), 2)
            for card in cards_for(machine)
        },
        "seconds": round(candidate.seconds, 4),
        "relative_step_cost": round(candidate.seconds / _fastest(plan), 3),
    }


def in_words(setup: Setup) -> str:
    """A setup in one phrase."""
    if setup.in_backward:
        where = "the optimizer inside backward"
    elif setup.zero_stage == 0:
        where = "ZeRO-0"
    else:
        where = f"ZeRO-{setup.zero_stage}"
        if setup.offloads_parameters:
            where += " with optimizer and weights in host memory"
        elif setup.offloads_optimizer:
            where += " with the optimizer in host memory"
    if setup.ema_offload:
        where += ", EMA in host memory"
    held = " (held in host memory)" if setup.offload_activations else ""
    return (
        f"{setup.optimizer}, {where}; checkpointing {_levels(setup)}{held}; global batch "
        f"{setup.global_batch} = {setup.micro_batch} x {setup.accumulation} accumulated x "
        f"{setup.ranks} {'process' if setup.ranks == 1 else 'processes'}, {setup.precision}"
    )


def why(plan: UnetPlan) -> str:
    """Why this candidate and not another."""
    chosen, exact = plan.choice, _exact(plan.choice)
    if plan.fault is not None:
        return f"nothing fits; this comes nearest. At fault: {plan.fault}"
    rival = next((c for c in plan.others if c.seconds < chosen.seconds and _exact(c)), None)
    if not exact:
        return "no exact optimizer fits: host memory holds its moments in less than 4 bytes each"
    if rival is not None:
        return "the cheapest step that fits; faster ways need more memory (--explain)"
    return "the cheapest step that fits"


def print_plan(
    plans: list[UnetPlan],
    config: Config,
    machine: Machine,
    console: Console,
    *,
    ratio: float,
    explain: bool,
) -> None:
    """Prints a table of terms, a line of choice and reason per U-Net, and the warnings."""
    table = Table(title=_title(machine, ratio), title_justify="left")
    table.add_column("GB (10^9 bytes)")
    for plan in plans:
        stage = config.stage(plan.unet_number)
        crop = stage.unet.crop
        pixels = f"{stage.size} px" if crop is None else f"{crop} of {stage.size} px"
        table.add_column(f"{stage.name}\n{pixels}", justify="right")

    def row(name: str, values: list[str], **style: Any) -> None:
        table.add_row(name, *values, **style)

    choices = [plan.choice for plan in plans]
    row("parameters", [f"{c.activations.num_parameters / 1e6:.1f} M" for c in choices])
    row(
        "micro-batch x accumulation",
        [f"{c.setup.micro_batch} x {c.setup.accumulation}" for c in choices],
        end_section=True,
    )
    has_teacher = any(c.cost.teacher for c in choices)
    for term in (*TERMS[:-1], "teacher", TERMS[-1]) if has_teacher else TERMS:
        row(term, [_number(getattr(c.cost, term)) for c in choices])
    cards = [int(c.cost.card * ratio) for c in choices]
    hosts = [_host(c, machine, ratio) for c in choices]
    where = "of a process" if machine.card is None else "on the card"
    row(f"total {where}", [_number(card) for card in cards], style="bold", end_section=True)
    row("host memory", [_number(host) for host in hosts])
    row("of it pinned", [_number(machine.share(c.cost.pinned)) for c in choices])
    row("disk per checkpoint", [_number(c.cost.disk) for c in choices])
    stages = [config.stage(plan.unet_number) for plan in plans]
    left = [
        disk_left(c.cost, c.activations.num_parameters, stage)
        for c, stage in zip(choices, stages, strict=True)
    ]
    row("disk when trained", [_number(nbytes) for nbytes in left])
    cards_known = cards_for(machine)
    for card in cards_known:
        taken = [hours(c, stage, card, machine) for c, stage in zip(choices, stages, strict=True)]
        row(f"hours on {card.name}, predicted", [in_hours(one) for one in taken])
    row("relative step cost", [f"{p.choice.seconds / _fastest(p):.2f}" for p in plans])
    row("fits", ["yes" if plan.fault is None else "NO" for plan in plans])
    console.print(table)
    if cards_known:
        console.print(_foretold(machine), markup=False)
    for plan in plans:
        console.print(f"U-Net {plan.unet_number}: {in_words(plan.choice.setup)}", markup=False)
        console.print(f"    why: {why(plan)}", markup=False)
        for warning in plan.warnings:
            console.print(f"    warning: {warning}", markup=False)
        if explain:
            for other in plan.others:
                console.print(f"    not taken: {_other(other, plan, machine, ratio)}", markup=False)
    if explain:
        console.print(
            "Activations: one training pass of the real U-Net on tensors without memory, peak of "
            "live bytes. Weights to buckets: DeepSpeed's own allocations. Workspace: CUDA context "
            "(0.6 GB, assumed) and 6 % allocator slack. Relative step cost: 1 is the fastest of "
            "the ways listed; rates of imagen_scale/planning/speed.py."
        )  # fmt: skip


def in_hours(hours: float) -> str:
    """Hours with two digits that count."""
    return f"{hours:.1f}" if hours < 10 else f"{hours:,.0f}"


def _foretold(machine: Machine) -> str:
    cards = "" if machine.ranks == 1 else f" on {machine.ranks} such cards together"
    return (
        f"Hours are of all steps{cards}, at {SHARE:.0%} of the card's stated rate: an assumption, "
        f"not measured. Pictures, validations and saving come on top."
    )


def _other(other: Candidate, plan: UnetPlan, machine: Machine, ratio: float) -> str:
    card, host = int(other.cost.card * ratio), _host(other, machine, ratio)
    too_large = []
    if machine.card is not None and card > machine.card:
        too_large.append(f"card {gb(card)}")
    if host > machine.ram:
        too_large.append(f"{'memory' if machine.card is None else 'host'} {gb(host)}")
    if too_large:
        reason = f"does not fit: {', '.join(too_large)}"
    elif not _exact(other) and _exact(plan.choice):
        reason = "fits, but is not exact AdamW"
    elif other.setup.offloads_parameters:
        reason = "fits, but streams every weight from the host"
    else:
        reason = "fits, but is not cheaper"
    relative = other.seconds / _fastest(plan)
    return f"{in_words(other.setup)}: {reason} (step cost {relative:.2f})"


def _host(candidate: Candidate, machine: Machine, ratio: float) -> int:
    """Bytes of one machine's memory; without a card a process's tensors lie there, too."""
    tensors = int(candidate.cost.card * ratio) if machine.card is None else 0
    return machine.share(candidate.cost.host + machine.ranks * tensors)


def _exact(candidate: Candidate) -> bool:
    return candidate.setup.optimizer in ("adamw", *WHOLE_MATRICES)


def _fastest(plan: UnetPlan) -> float:
    return min(c.seconds for c in [plan.choice, *plan.others])


def _levels(setup: Setup) -> str:
    levels = setup.checkpointing
    return levels[0] if len(set(levels)) == 1 else "/".join(levels)


def _number(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f}"


def _title(machine: Machine, ratio: float) -> str:
    ram = f"{gb(machine.ram)} of host memory to spend"
    processes = f"{machine.ranks} process{'' if machine.ranks == 1 else 'es'}"
    if 0 < machine.local_ranks < machine.ranks:
        ram += " on each machine"
        processes += f", {machine.local_ranks} on each machine"
    if machine.card is None:
        return f"Memory plan: no card, {ram}, {processes}"
    title = f"Memory plan: {gb(machine.card)} on each card, {ram}, {processes}"
    return title if ratio == 1 else f"{title}; corrected x{ratio:.3f} as measured on this card"
