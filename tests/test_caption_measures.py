"""Colours that captions name, and how much pictures of one caption vary."""

import pytest
import torch

from imagen_scale.evaluation.colour_words import NAMES, agreement, asked_for, shares
from imagen_scale.evaluation.diversity import diversity

# 0 to 255, as a painter would call them.
PAINTS = {
    "red": (220, 30, 30), "orange": (240, 140, 20), "yellow": (250, 220, 40),
    "green": (60, 170, 60), "blue": (40, 90, 210), "purple": (130, 60, 190),
    "pink": (250, 140, 180), "brown": (120, 70, 30), "black": (15, 15, 15),
    "grey": (130, 130, 130),
}  # fmt: skip
WHITE = (255, 255, 255)


def picture(*halves):
    """Stripes of such colours, (1, 3, 8, 8) in [-1, 1]."""
    columns = [torch.tensor(colour).float() for colour in halves for _ in range(8 // len(halves))]
    rows = torch.stack(columns, 1)[:, None].expand(3, 8, -1)
    return (rows / 127.5 - 1)[None]


@pytest.mark.parametrize("name", list(PAINTS))
def test_a_paint_is_called_by_its_name(name):
    found = dict(zip(NAMES, shares(picture(PAINTS[name]))[0].tolist(), strict=True))
    assert found == {other: float(other == name) for other in NAMES}


def test_white_paper_does_not_count():
    (found,) = shares(picture(WHITE, WHITE, WHITE, PAINTS["red"]))
    assert found.sum() == found[NAMES.index("red")] == 1
    assert not shares(picture(WHITE)).any()


def test_words_are_found_whole_and_once():
    assert asked_for("A red-and-Green drawing, red as gray, violet") == [
        "red", "green", "grey", "purple"
    ]  # fmt: skip
    assert asked_for("a bored shepherd, evergreen, blues") == []


def test_agreement_counts_the_colours_that_are_named():
    captions = ["a red and blue flag", "a dog", "a green leaf"]
    real = torch.cat([picture(PAINTS["red"], PAINTS["blue"]), picture(WHITE),
                      picture(PAINTS["green"], WHITE)])  # fmt: skip
    generated = torch.cat([picture(PAINTS["red"], PAINTS["yellow"]), picture(WHITE),
                           picture(PAINTS["blue"])])  # fmt: skip
    found = agreement(captions, shares(generated), shares(real))
    assert found == (3, pytest.approx(1 / 3), 1.0)
    assert agreement(["a dog"], shares(generated[:1]), shares(real[:1])) is None


def test_diversity_is_the_difference_between_seeds_beside_that_between_captions():
    one = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    assert diversity([one, one]) == (2, 0.0, 0.5)
    # From 0 to 0.4, from 0 to 0.8 and from 0.4 to 0.8 of a range of 2.
    moved = diversity([one, one + 0.4, one + 0.8])
    assert moved.same_caption == pytest.approx((0.2 + 0.4 + 0.2) / 3)
    assert diversity([one[:1], one[:1]]).other_captions is None  # there are no others
