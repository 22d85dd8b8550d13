"""The average of the weights over an engine that is nothing but tensors."""

from types import SimpleNamespace

import torch

from imagen_scale.training.ema import Ema
from imagen_scale.training.engine import Fragment


def average(*, bad: int | None):
    """An average whose only master holds a parameter of four elements, and two of padding."""
    master = torch.arange(6.0)
    if bad is not None:
        master[bad] = torch.nan
    fragments = [[Fragment("weight", 0, 4, 0)]]
    return Ema(SimpleNamespace(masters=lambda: [master], fragments=lambda: fragments), 0.9)


def test_padding_is_nobodys_and_may_be_anything():
    assert average(bad=None).is_finite()
    assert average(bad=5).is_finite()
    assert not average(bad=3).is_finite()


def test_the_first_steps_forget_the_random_start():
    ema = average(bad=None)
    ema.masters[0] += 11
    ema.update(1)  # decay 2 / 11 rather than 0.9
    torch.testing.assert_close(ema.shards[0], torch.arange(6.0) + 9)
