"""Batches on their way to the card; the card's streams are stand-ins, since there is none here."""

from contextlib import contextmanager

import pytest
import torch

from imagen_scale.data.sequence import Batch
from imagen_scale.training.feed import Feed

CPU = torch.device("cpu")


def batch(number):
    images = torch.full((1, 3, 2, 2), number, dtype=torch.uint8)
    text = torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    return Batch(images, *text, torch.tensor([number]), [str(number)])


def source(count, asked):
    for number in range(count):
        asked.append(number)
        yield batch(number)


def test_batches_come_in_order_and_each_once():
    assert [int(b.positions) for b in Feed(source(3, []), CPU)] == [0, 1, 2]


def test_the_next_one_is_loaded_when_there_is_time_and_no_more_than_one():
    asked = []
    feed = Feed(source(3, asked), CPU)
    next(feed)
    assert asked == [0]
    feed.prefetch()
    feed.prefetch()
    assert asked == [0, 1]
    assert int(next(feed).positions) == 1 and asked == [0, 1]
    next(feed)
    feed.prefetch()  # nothing is left
    with pytest.raises(StopIteration):
        next(feed)


def test_a_copy_runs_beside_the_kernels_and_is_waited_for_by_them(monkeypatch):
    """Copied within the side stream, waited for by the stream that computes, kept for it."""
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    side, main = Stream("side"), Stream("main")

    @contextmanager
    def within(stream):
        events.append(f"in {stream.name}")
        yield
        events.append(f"out of {stream.name}")

    def to(tensor, device, **options):
        assert options == {"non_blocking": True}
        events.append("copy")
        return tensor.clone()

    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda tensor, stream: events.append(f"kept for {stream.name}"),
    )
    loaded = source(2, [])
    feed = Feed(loaded, CPU)
    feed._stream = side
    first = next(feed)
    copied = ["in side", "copy", "copy", "copy", "out of side"]
    assert events == [*copied, "main waits for side", *["kept for main"] * 3]
    assert torch.equal(first.images, batch(0).images)
    events.clear()
    feed.prefetch()
    assert events == copied  # nobody waits yet
