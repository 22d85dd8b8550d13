"""How much pictures of one caption differ from seed to seed."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from imagen_scale.sampling.measures import root_mean_square


class Diversity(NamedTuple):
    """Root mean square differences between pictures, mean over the pairs, levels 0 to 1."""

    seeds: int  # pictures of each caption
    same_caption: float  # between pictures of one caption
    # Between pictures of different captions, for comparison; None of a single caption.
    other_captions: float | None


def diversity(pictures: list[Tensor]) -> Diversity:
    """Compares pictures of the same captions made from several seeds.

    A stage that always draws the one picture has zero between those of one caption.

    Args:
        pictures: For each of two or more seeds (N, 3, H, W) in [-1, 1], captions in one order.
    """
    same = torch.cat(
        [root_mean_square(one, two) for one, two in itertools.combinations(pictures, 2)]
    )
    some = pictures[0]
    others = [root_mean_square(some[i : i + 1], some[i + 1 :]) for i in range(len(some) - 1)]
    apart = torch.cat(others).mean().item() if others else None
    return Diversity(len(pictures), same.mean().item(), apart)
