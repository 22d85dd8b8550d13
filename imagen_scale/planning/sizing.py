"""A first configuration for a set of pictures and a card, each choice with its reason."""

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

GB = 10**9

# Networks as `configs/` ships them: the demo's, pokemon_64_256's and cascade_64_256's.
_DEMO = [
    {"dim": 32, "dim_mults": [1, 2, 4], "num_resnet_blocks": 1,
     "layer_attns": [False, False, True], "layer_cross_attns": [False, False, True],
     "attn_heads": 4},
    {"dim": 16, "dim_mults": [1, 2, 4], "num_resnet_blocks": 1, "layer_attns": False,
     "layer_cross_attns": [False, False, True], "attn_heads": 4},
]  # fmt: skip
_MIDDLE = [
    {"dim": 128, "dim_mults": [1, 2, 4], "num_resnet_blocks": 1,
     "layer_attns": [False, True, True], "layer_cross_attns": [False, True, True],
     "attn_heads": 8, "attend_at_middle": False},
    {"dim": 64, "dim_mults": [1, 2, 4, 8], "num_resnet_blocks": [1, 2, 4, 4],
     "layer_attns": False, "layer_cross_attns": [False, False, False, True], "attn_heads": 8,
     "memory_efficient": True},
]  # fmt: skip
_LARGE = [
    {"dim": 256, "dim_mults": [1, 2, 3, 4], "num_resnet_blocks": 3,
     "layer_attns": [False, True, True, True], "layer_cross_attns": [False, True, True, True],
     "attn_heads": 8},
    {"dim": 128, "dim_mults": [1, 2, 4, 8], "num_resnet_blocks": [2, 4, 4, 4],
     "layer_attns": [False, False, False, True],
     "layer_cross_attns": [False, False, False, True], "attn_heads": 8,
     "memory_efficient": True},
]  # fmt: skip


class Size(NamedTuple):
    """Networks, and how long they are trained."""

    unets: list[dict[str, Any]]
    sides: tuple[int, int]  # of the stages, in pixels
    steps: int
    global_batch: int
    why: str


DEMO = Size(_DEMO, (16, 64), 1500, 16, "without a card only small networks train in an hour")
MIDDLE = Size(
    _MIDDLE, (64, 256), 100_000, 16,
    "networks of 45 and 107 M parameters learn a set of thousands in a day or two on a 12 GB card",
)  # fmt: skip
LARGE = Size(
    _LARGE, (64, 256), 200_000, 64,
    "networks of 411 and 444 M parameters are worth their weeks on a large set only",
)  # fmt: skip
PASSES = 2000  # over a small set; beyond it is learned by heart
MANY = 50_000  # pictures from which on the large networks are taken
LARGE_CARD = 11 * GB


class Seen(NamedTuple):
    """What is known of the pictures."""

    pictures: int
    shorter_sides: Sequence[int]  # of some of them, in pixels; empty of drawings
    longest_caption: int  # of some of them, in tokens


class Choice(NamedTuple):
    """A key of the configuration, and why it has its value."""

    key: str
    value: Any
    why: str


def choose(seen: Seen, card: int | None) -> list[Choice]:
    """The choices for a set of pictures.

    Args:
        seen: The pictures.
        card: Bytes of the card's memory; None without one.
    """
    size = DEMO if card is None else MIDDLE
    if card is not None and card >= LARGE_CARD and seen.pictures >= MANY:
        size = LARGE
    sides, why = _sides(size, seen.shorter_sides)
    unets = [{**unet, "max_text_len": _max_text_len(seen.longest_caption)}
             for unet in size.unets[: len(sides)]]  # fmt: skip
    share = 0.0 if seen.pictures < 40 else 0.1 if seen.pictures < 2000 else 0.05
    enough = PASSES * seen.pictures // size.global_batch
    steps = min(size.steps, max(size.steps // 10, enough // 1000 * 1000))
    passes = steps * size.global_batch / max(1, seen.pictures)
    return [
        Choice("imagen.image_sizes", sides, why),
        Choice("unets", unets, size.why),
        Choice("unets.*.max_text_len", unets[0]["max_text_len"],
               f"the longest caption looked at has {seen.longest_caption} tokens"),
        Choice("data.val_fraction", share,
               "too few pictures to hold any out" if not share
               else "held out, to see whether more than the pictures themselves is learned"),
        Choice("training.recipe", "modern",
               "predicts the clean picture; docs/recipes.md says what that brings"),
        Choice("training.steps", [steps] * len(sides),
               f"{passes:,.0f} passes over {seen.pictures:,} pictures; fewer where the error on "
               f"held-out pictures rises again"),
        Choice("training.global_batch", size.global_batch, "pictures of each step"),
        Choice("training.precision", "fp32" if card is None else "auto",
               "processors compute it" if card is None else "16 bits where the card has them"),
        Choice("memory.budget", None if card is None else "auto",
               "there is no card to plan for" if card is None
               else "micro-batch, checkpointing and offloading follow the memory that is free"),
    ]  # fmt: skip


def _sides(size: Size, shorter: Sequence[int]) -> tuple[list[int], str]:
    small, large = size.sides
    if not shorter:
        return [small, large], "drawings have no size of their own"
    middle = median(shorter)
    if middle < 0.75 * large:
        return [small], (
            f"half of the pictures are smaller than {middle:g} px: a stage of {large} px would "
            f"learn to blur"
        )
    return [small, large], f"the pictures' shorter side is {middle:g} px in the middle"


def _max_text_len(tokens: int) -> int:
    """The next power of two, 8 at least and 256 at most."""
    return min(256, max(8, 1 << (max(1, tokens) - 1).bit_length()))


def nested(choices: Sequence[Choice]) -> dict[str, Any]:
    """The choices as a configuration has them."""
    config: dict[str, Any] = {}
    for key, value, _ in choices:
        if "*" not in key:
            section, _, name = key.rpartition(".")
            (config.setdefault(section, {}) if section else config)[name] = value
    return config
