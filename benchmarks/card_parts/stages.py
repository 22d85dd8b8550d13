"""Part 2: every stage of the large cascades within a limit, as this program and as MinImagen."""

from contextlib import nullcontext
from typing import Any

import torch

from card_parts.measurement import LeftOut
from card_parts.scenes import scene
from card_parts.steps import Timed, micro_batches, session_of, timed_steps
from card_parts.timing import device, now
from imagen_scale.config import Config
from imagen_scale.models.unet import UNet
from imagen_scale.planning.activations import Activations
from imagen_scale.planning.cache import cached_flops
from imagen_scale.planning.cost import CARD_PROCESS, process_bytes, step_cost
from imagen_scale.planning.machine import this_machine
from imagen_scale.planning.planner import Planner
from imagen_scale.planning.report import in_words
from imagen_scale.planning.setup import Setup
from imagen_scale.training.memory_use import (
    is_out_of_memory,
    peak_host_bytes,
    release_memory,
)
from imagen_scale.training.objective import Objective

MAX_ACCUMULATION = 2  # micro-batches of a step that is taken; the rest is counted
STEPS, WARM_UP = 2, 1


def measure(
    cascade: str, number: int, limit: int | None, context: int | None, *, rehearse: bool
) -> dict[str, Any]:
    """Plans one stage and trains it for some steps.

    Args:
        cascade: Name of the configuration.
        number: Of the stage, from 1.
        limit: Bytes of the card, the context counted; None for all of it.
        context: Bytes of a bare context; None where that is not known.
        rehearse: Small networks.

    Raises:
        LeftOut: If nothing that the planner knows fits this computer.
    """
    config = scene(rehearse=rehearse).cascades[cascade]
    stage = config.stage(number)
    outside = bound_card(limit, context)
    budget = this_machine(ranks=1)
    if limit is not None and budget.card is not None:
        budget = budget._replace(card=min(limit, budget.card))
    plan = Planner(stage, budget).plan()
    setup, activations = plan.choice.setup, plan.choice.activations
    if plan.fault:
        raise LeftOut(f"does not fit: {plan.fault}; nearest is {in_words(setup)}")
    planned = setup.accumulation
    setup = setup._replace(accumulation=min(planned, MAX_ACCUMULATION))
    predicted = _predicted(setup, activations)
    with session_of(stage, setup) as session:
        baseline = session.baseline
        timed = timed_steps(session, warm_up=WARM_UP, steps=STEPS, planned=planned)
        figures = _speed(config, number, setup, timed)
    return figures | predicted | memory(timed, outside, context) | {
        "parameters": activations.num_parameters,
        "limit": budget.card,
        "planned": in_words(plan.choice.setup),
        "accumulated": [setup.accumulation, planned],
        "host": peak_host_bytes() - baseline,
    }  # fmt: skip


def bound_card(limit: int | None, context: int | None) -> int:
    """Keeps torch's allocator within a limit; returns the bytes that others use now.

    Those are contexts, this process's included, and whatever else is on the card.

    Raises:
        LeftOut: If the card is smaller than the limit.
    """
    if not torch.cuda.is_available():
        return 0
    torch.zeros(1, device=device())  # makes the context
    free, everything = torch.cuda.mem_get_info()
    outside = everything - free - torch.cuda.memory_reserved()
    if limit is not None:
        own = max(CARD_PROCESS, context or 0)  # libraries are loaded into it as they are used
        if not own < limit <= everything:
            raise LeftOut(f"not to be tried on a card of {everything / 1e9:.1f} GB")
        torch.cuda.set_per_process_memory_fraction((limit - own) / everything)
    return outside


def memory(timed: Timed, outside: int, context: int | None) -> dict[str, Any]:
    """What was used of the card, once training is over and its tensors are gone.

    Args:
        timed: The training.
        outside: From `bound_card`.
        context: Of a bare process.
    """
    if not torch.cuda.is_available():
        return {}
    free, everything = torch.cuda.mem_get_info()
    grown = max(0, everything - free - torch.cuda.memory_reserved() - outside)
    whole = (context or CARD_PROCESS) + grown
    return {
        "allocated": timed.allocated, "reserved": timed.reserved, "context": whole,
        "in_use": timed.reserved + whole,
    }  # fmt: skip


def _predicted(setup: Setup, activations: Activations) -> dict[str, Any]:
    on_card = torch.cuda.is_available()
    cost = step_cost(setup, activations, on_card=on_card)
    return {
        "predicted": cost.card,
        "host_predicted": cost.host - process_bytes(on_card=on_card),
    }


def _speed(config: Config, number: int, setup: Setup, timed: Timed) -> dict[str, Any]:
    # Recomputing norms adds no matrix products: these are the FLOPs of the mathematics alone.
    levels = config.unets[number - 1].num_levels
    flops = cached_flops(config.stage(number), checkpointing=("norms",) * levels)
    return {
        "step_s": timed.step_s,
        "images_per_s": timed.images_per_s,
        "tflops": timed.images_per_s * flops / 1e12,
        "precision": setup.precision,
        "loss": timed.losses[-1],
    }


def minimagen(
    cascade: str, number: int, limit: int | None, context: int | None, *,
    only_this: bool, rehearse: bool,
) -> dict[str, Any]:  # fmt: skip
    """What MinImagen's `train.py` holds at batch 1: fp32, Adam, nothing recomputed or offloaded.

    The package is not needed: it is the same network, with this program's attention, which holds
    less than MinImagen's own. It fits where MinImagen would not, never the other way round.

    Args:
        cascade: Name of the configuration.
        number: Of the stage that is trained.
        limit: Bytes of the card, the context counted.
        context: Bytes of a bare context.
        only_this: Leave out the other U-Nets, which MinImagen keeps on the card with one Adam
            over all of them.
        rehearse: Small networks.
    """
    config = scene(rehearse=rehearse).cascades[cascade]
    outside = bound_card(limit, context)
    figures: dict[str, Any] = {"planned": "fp32, Adam, batch 1"}
    try:
        with torch.device(device()) if torch.cuda.is_available() else nullcontext():
            unets = {
                stage.number: UNet(stage.network).train()
                for stage in config.stages()
                if stage.number == number or not only_this
            }
        timed = _plain_steps(config, number, unets)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        allocated = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        # Not a failure: it is what was asked.
        return figures | {"full": str(error).splitlines()[0], "allocated": allocated}
    parameters = sum(p.numel() for unet in unets.values() for p in unet.parameters())
    del unets
    release_memory()
    return figures | memory(timed, outside, context) | {
        "parameters": parameters, "step_s": timed.step_s, "images_per_s": timed.images_per_s,
    }  # fmt: skip


def _plain_steps(config: Config, number: int, unets: dict[int, UNet]) -> Timed:
    stage = config.stage(number)
    parameters = [p for unet in unets.values() for p in unet.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=stage.lr)
    objective, batches = Objective(stage, device()), micro_batches(stage, 1)
    losses, seconds = [], []
    for _ in range(WARM_UP + STEPS):  # the moments are there from the second step on
        start = now()
        optimizer.zero_grad()
        loss = objective.losses(unets[number], next(batches)).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(now() - start)
    step_s = sum(seconds[WARM_UP:]) / STEPS
    has_card = torch.cuda.is_available()
    return Timed(
        step_s, 1 / step_s, losses,
        torch.cuda.max_memory_allocated() if has_card else 0,
        torch.cuda.max_memory_reserved() if has_card else 0,
    )  # fmt: skip
