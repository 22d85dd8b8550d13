"""The loss on held-out pictures."""

import math

import torch

from imagen_scale.data.loading import batches
from imagen_scale.data.sequence import CaptionedImages
from imagen_scale.training.feed import Feed
from imagen_scale.training.ranks import mean_over_ranks, rank, world_size
from imagen_scale.training.session import Session


@torch.no_grad()
def validation_loss(session: Session, held_out: CaptionedImages, num_workers: int) -> float:
    """Mean loss with the same noise and times at every validation; all ranks together.

    Args:
        session: Whose weights, those in training rather than their average.
        held_out: At most `training.val_batches` micro-batches of each rank are taken.
        num_workers: Loader processes.
    """
    micro_batch = session.setup.micro_batch
    together = micro_batch * world_size()
    steps = min(session.stage.training.val_batches, math.ceil(len(held_out) / together))
    loaded = batches(
        held_out,
        start_step=0,
        steps=steps,
        global_batch=together,
        micro_batch=micro_batch,
        rank=rank(),
        world_size=world_size(),
        num_workers=num_workers,
    )
    engine, objective = session.engine, session.objective
    engine.eval()
    losses = [objective.loss(engine, batch, "validation") for batch in Feed(loaded, engine.device)]
    engine.train()
    return mean_over_ranks(torch.stack(losses).mean())
