"""What a training takes in hours and leaves on disk, before it begins.

Hours are predicted: from what a card's maker states, and a share of it that is stated here and was
not measured (`benchmarks/card.py` measures it). Stopping for pictures, validations and checkpoints
is not counted.
"""

import math
import re
from typing import NamedTuple

from imagen_scale.config import StageConfig
from imagen_scale.planning.cost import Cost
from imagen_scale.planning.machine import Machine
from imagen_scale.planning.planner import Candidate
from imagen_scale.planning.speed import FLOPS_PER_S, step_seconds


class Card(NamedTuple):
    """A card as its maker describes it."""

    name: str
    gb: int  # memory
    flops: float  # dense, 16 bits with sums in fp32, FLOP/s
    bytes_per_s: float  # from and to its memory


# Source: NVIDIA's white papers of the Ampere, Ada, Blackwell and Hopper architectures and data
# sheets of T4, L4, A10 and A100. The first is the card that `speed.py` has its round figures of.
CARDS = (
    Card("RTX 3060", 12, 25e12, 360e9),
    Card("RTX 4070", 12, 58e12, 504e9),
    Card("RTX 5070", 12, 61e12, 672e9),
    Card("T4", 16, 65e12, 320e9),
    Card("RTX 4080", 16, 97e12, 717e9),
    Card("L4", 24, 121e12, 300e9),
    Card("A10", 24, 125e12, 600e9),
    Card("RTX 3090", 24, 71e12, 936e9),
    Card("RTX 4090", 24, 165e12, 1008e9),
    Card("A100", 80, 312e12, 1935e9),
    Card("H100", 80, 989e12, 3350e9),
)
# Of the stated rate a training step reaches so much, in this plan.
SHARE = FLOPS_PER_S["bf16"] / CARDS[0].flops


def cards_for(machine: Machine) -> list[Card]:
    """The cards that hours are foretold for: the one at hand, else those of the memory planned for.

    There are none without a card, and where the one at hand is not in the list.
    """
    if machine.card is None:
        return []
    if machine.name != "cpu":
        return [card for card in CARDS if _is(card, machine.name)]
    sizes = sorted({card.gb for card in CARDS})
    size = next((gb for gb in sizes if gb * 1e9 >= 0.9 * machine.card), sizes[-1])
    return [card for card in CARDS if card.gb == size]


def _is(card: Card, name: str) -> bool:
    """Whether a driver's name means this card: a Ti, a SUPER or a laptop's is another."""
    return re.search(rf"\b{card.name}\b(?! (Ti|SUPER|Laptop|D\b))", name) is not None


def hours(candidate: Candidate, stage: StageConfig, card: Card, machine: Machine) -> float:
    """Hours that a U-Net's whole training takes on a card.

    Args:
        candidate: How it is trained.
        stage: The U-Net.
        card: Each card that it is trained on.
        machine: How the cards are joined.
    """
    seconds = step_seconds(
        candidate.setup, candidate.cost, candidate.activations, candidate.flops,
        link=machine.link, compute_rate=card.flops / CARDS[0].flops,
        memory_rate=card.bytes_per_s / CARDS[0].bytes_per_s,
    )  # fmt: skip
    return stage.steps * seconds / 3600


def disk_left(cost: Cost, parameters: int, stage: StageConfig) -> int:
    """Bytes that a U-Net's finished training leaves: checkpoints, averages, the file for sampling.

    Args:
        cost: Of its step.
        parameters: How many it has.
        stage: The U-Net; how many checkpoints are kept.
    """
    training = stage.training
    inference = 4 * parameters
    kept = training.keep_checkpoints
    if training.keep_every is not None:
        kept += stage.steps // math.lcm(training.keep_every, training.checkpoint_every)
    # A snapshot of each average is written as the file for sampling is, and at the last step too.
    snapshots = len(training.ema_widths) * -(-stage.steps // stage.ema_snapshot_every)
    return kept * (cost.disk - inference) + (1 + snapshots) * inference
