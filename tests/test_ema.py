"""The average of the weights over an engine that is nothing but tensors."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from imagen_scale.runs.shares import Fragment
from imagen_scale.training import ema as ema_module
from imagen_scale.training.ema import Ema
from imagen_scale.training.ferry import Ferry


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


@pytest.mark.parametrize("elements", [1, 3, 10, 64])
@pytest.mark.parametrize("are_near", [True, False])
def test_what_comes_in_pieces_is_averaged_to_the_same_bits(elements, are_near, monkeypatch):
    """Masters of another type, and those far away, which come through two buffers."""
    monkeypatch.setattr(ema_module, "EXCHANGE_ELEMENTS", elements)
    monkeypatch.setattr(ema_module, "_are_near", lambda a, b: are_near)
    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(size, generator=generator).bfloat16() for size in (37, 10, 1)]
    ours = Ema(SimpleNamespace(masters=lambda: masters), 0.9)
    whole = [master.float() for master in masters]
    for step in (1, 2, 3):
        for master in masters:
            master += 1
        ours.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for shard, master in zip(whole, masters, strict=True):
            shard.lerp_(master.float(), 1 - decay)
    assert all(map(torch.equal, ours.shards, whole))


def test_the_next_piece_is_on_its_way_while_one_is_used(monkeypatch):
    """On a card: after the update, beside the kernels; a piece is used when it has arrived."""
    events = []

    class Stream:
        def wait_stream(self, other):
            events.append(f"after {other}")

        def record_event(self):
            number = sum(event == "sent" for event in events)
            return SimpleNamespace(synchronize=lambda: events.append(f"arrived {number}"))

    copy = torch.Tensor.copy_

    def copied(tensor, other, non_blocking=False):
        assert non_blocking
        events.append("sent")
        return copy(tensor, other)

    ferry = Ferry(2, torch.device("cpu"))
    ferry._stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the update")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    pieces = [slice(0, 2), slice(2, 4), slice(4, 5)]
    found = []
    for _, values in ferry.bring(torch.arange(5.0), iter(pieces)):
        events.append("used")
        found += values.clone().tolist()
    assert found == [0, 1, 2, 3, 4]
    assert events == [
        "after the update", "sent", "sent", "arrived 1", "used",
        "sent", "arrived 2", "used", "arrived 3", "used",
    ]  # fmt: skip
