"""What the network makes of held-out pictures."""

import math
from collections.abc import Iterator

import torch

from imagen_scale.data.loading import batches
from imagen_scale.data.sequence import Batch, CaptionedImages
from imagen_scale.training.feed import Feed
from imagen_scale.training.ranks import mean_over_ranks, rank, world_size
from imagen_scale.training.session import Session

PURPOSE = "validation"  # its noise and times, the same at every validation


@torch.no_grad()
def validate(session: Session, held_out: CaptionedImages, num_workers: int) -> dict[str, float]:
    """Measures the weights in training, rather than their average; all ranks together.

    Args:
        session: Whose weights.
        held_out: At most `training.val_batches` micro-batches of each rank are taken.
        num_workers: Loader processes.

    Returns:
        By name: "val_loss", the mean loss; with `training.val_x0` "val_x_0_error", the mean squared
        error of the predicted clean picture over the log-SNRs of an evaluation.
    """
    engine, objective = session.engine, session.objective
    engine.eval()
    losses, errors = [], []
    for batch in Feed(_batches(session, held_out, num_workers), engine.device):
        losses.append(objective.loss(engine, batch, PURPOSE))
        if session.stage.training.val_x0 and session.stage.few_steps is None:
            errors.append(objective.x_0_errors(engine, batch, PURPOSE).mean())
    engine.train()
    found = {"val_loss": losses, "val_x_0_error": errors}
    return {name: mean_over_ranks(torch.stack(of).mean()) for name, of in found.items() if of}


def num_validated(session: Session, held_out: CaptionedImages) -> int:
    """Samples that a validation takes, over all ranks: the first ones, the same each time."""
    return _steps(session, held_out) * session.setup.micro_batch * world_size()


def _steps(session: Session, held_out: CaptionedImages) -> int:
    together = session.setup.micro_batch * world_size()
    return min(session.stage.training.val_batches, math.ceil(len(held_out) / together))


def _batches(session: Session, held_out: CaptionedImages, num_workers: int) -> Iterator[Batch]:
    """This rank's share of the pictures, from the first at every validation."""
    micro_batch = session.setup.micro_batch
    return batches(
        held_out,
        start_step=0,
        steps=_steps(session, held_out),
        global_batch=micro_batch * world_size(),
        micro_batch=micro_batch,
        rank=rank(),
        world_size=world_size(),
        num_workers=num_workers,
    )
