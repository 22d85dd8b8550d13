"""Real training steps on random pictures: the trainer's own engine, loss and stepper."""

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count, pairwise
from typing import Any, NamedTuple

import torch
from gpu_memory import full_step_seconds
from support.environment import rank_variables, reserved_port
from torch import Tensor

from card_parts.timing import now
from imagen_scale.config import StageConfig
from imagen_scale.data.sequence import Batch
from imagen_scale.files.pinning import can_pin
from imagen_scale.planning.setup import Setup
from imagen_scale.training import ranks
from imagen_scale.training.feed import Feed
from imagen_scale.training.objective import Objective
from imagen_scale.training.session import Session
from imagen_scale.training.switches import switched

PICTURES = 16  # different ones; every sample has noise of its own


class Timed(NamedTuple):
    """What some steps took."""

    step_s: float  # with the accumulation of a real run
    images_per_s: float
    losses: list[float]
    allocated: int  # peak of live tensors since the session was begun; 0 without a card
    reserved: int  # peak of the allocator


@contextmanager
def session_of(stage: StageConfig, setup: Setup) -> Iterator[Session]:
    """A session in the one process that there is, with the switches of its configuration."""
    if not torch.distributed.is_initialized():
        with reserved_port() as port:
            os.environ.update(rank_variables(0, 1, port))
            ranks.check_machine()
            ranks.join()
    with switched(stage.training), Session(stage, setup, print) as session:
        yield session


def micro_batches(stage: StageConfig, micro_batch: int) -> Iterator[Batch]:
    """Endless micro-batches as the loader gives them.

    What a sample is depends on its position alone, whatever the micro-batch.
    """
    size, width = stage.size, stage.network.text_embed_dim
    tokens = stage.network.max_text_len
    generator = torch.Generator().manual_seed(0)
    shape = (PICTURES, stage.imagen.channels, size, size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    text_embeds = torch.randn(PICTURES, tokens, width, generator=generator)
    words = torch.arange(PICTURES) * tokens // PICTURES + 1  # captions of every length
    text_mask = torch.arange(tokens) < words[:, None]
    text_embeds[~text_mask] = 0
    text_embeds = text_embeds.half()  # as they are stored

    @cache
    def parts(first: int) -> list[Tensor]:
        which = torch.arange(first, first + micro_batch) % PICTURES
        chosen = [part[which] for part in (images, text_embeds, text_mask)]
        return [part.pin_memory() for part in chosen] if can_pin() else chosen

    for position in count(step=micro_batch):
        positions = torch.arange(position, position + micro_batch)
        yield Batch(*parts(position % PICTURES), positions, [""] * micro_batch)


def feed(session: Session, batches: Iterator[Batch] | None = None) -> Feed:
    """Micro-batches as the stepper takes them.

    Args:
        session: Whose.
        batches: None for its own, from the first on.
    """
    batches = batches or micro_batches(session.stage, session.setup.micro_batch)
    return Feed(batches, session.engine.device)


def take_noise_from_cpu(objective: Objective) -> None:
    """Makes a card draw what a CPU would: their generators differ, and so would the losses."""
    on_cpu, device = Objective(objective.stage, torch.device("cpu")), objective.device

    def draw(*args: Any, **options: Any) -> Any:
        drawn = on_cpu.draw(*args, **options)
        return type(drawn)(*(None if part is None else part.to(device) for part in drawn))

    objective.draw = draw  # type: ignore[method-assign]


def losses_of(session: Session, batches: Feed, steps: int) -> list[float]:
    """Loss of each of some steps, the average updated as in a run.

    Args:
        session: It is.
        batches: From `feed`.
        steps: How many.

    Raises:
        RuntimeError: If a step was left out.
    """
    losses = []
    for _ in range(steps):
        stepped = session.stepper.step(batches, session.stage.lr)
        session.step += 1
        session.ema.update(session.step)
        losses.append(float(stepped.loss))
        if not stepped.applied and session.setup.precision != "fp16":  # which looks for its scale
            raise RuntimeError(f"step {session.step} was left out: a gradient was not finite")
    return losses


def weights_of(session: Session) -> dict[str, Tensor]:
    """Every weight as the masters have it, fp32 on the CPU."""
    return {
        name: session.engine.gather(parameter).detach().float().cpu().clone()
        for name, parameter in session.engine.module.named_parameters()
    }


def missed(
    found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]
) -> float:
    """How far weights are from where they should be, over how far they should have moved.

    1 is what weights that were not trained at all would have.
    """
    away = sum((found[name] - expected[name]).square().sum().item() for name in expected)
    moved = sum((expected[name] - start[name]).square().sum().item() for name in expected)
    return (away / moved) ** 0.5


def timed_steps(session: Session, *, warm_up: int, steps: int, planned: int | None = None) -> Timed:
    """Takes steps and times them.

    Args:
        session: Fresh.
        warm_up: Steps before the clock runs.
        steps: Steps that are timed.
        planned: Micro-batches of a real step, where the session accumulates fewer: what is
            missing is counted at the time of one.
    """
    setup = session.setup
    planned = planned or setup.accumulation
    is_shortened = planned > setup.accumulation
    marks: list[float] = []

    def clocked(batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if is_shortened:  # only there: waiting for the card costs small networks time
                marks.append(now())
            yield batch

    batches = feed(session, clocked(micro_batches(session.stage, setup.micro_batch)))
    losses = losses_of(session, batches, warm_up)
    step_s, micro_s = [], []
    for _ in range(steps):
        marks.clear()
        start = now()
        losses += losses_of(session, batches, 1)
        step_s.append(now() - start)
        micro_s += [b - a for a, b in pairwise(marks)]
    seconds = statistics.median(step_s)
    if is_shortened:
        seconds = full_step_seconds([seconds], micro_s, setup.accumulation, planned)
    allocated = reserved = 0
    if torch.cuda.is_available():
        allocated = torch.cuda.max_memory_allocated()
        reserved = torch.cuda.max_memory_reserved()
    return Timed(seconds, planned * setup.micro_batch / seconds, losses, allocated, reserved)
