"""Stages and the text encoder stay loaded for the next pictures, as far as memory allows."""

import pytest
import torch
from support.tiny import write_run, write_stage

from imagen_scale.data.encoder import TextEncoder
from imagen_scale.errors import EnvironmentProblem
from imagen_scale.sampling import groups, residents
from imagen_scale.sampling.cascade import Cascade
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.residents import Residents
from imagen_scale.sampling.stage import Stage
from imagen_scale.sampling.stages import TrainedStages

QUICK = {"steps": 2, "runtime": "torch"}


@pytest.fixture
def loads(monkeypatch):
    """What is loaded and freed, in order: the numbers of U-Nets, and "text"."""
    told = []

    def watch(kind, name, word):
        method = getattr(kind, name)

        def watched(self, *arguments, **options):
            result = method(self, *arguments, **options)
            told.append(word(self))
            return result

        monkeypatch.setattr(kind, name, watched)

    watch(Stage, "__init__", lambda stage: stage.config.number)
    watch(Stage, "close", lambda stage: -stage.config.number)
    watch(TextEncoder, "__init__", lambda encoder: "text")
    watch(TextEncoder, "close", lambda encoder: "-text")
    return told


def pixels(pictures):
    return [picture.tobytes() for picture in pictures]


def test_a_second_call_loads_nothing_and_draws_the_same(run, loads):
    with Cascade.load(run, runtime="torch") as cascade:
        first = pixels(cascade.sample(["sun", "key"], steps=2))
        assert loads == ["text", 1, 2]
        assert pixels(cascade.sample(["sun", "key"], steps=2)) == first
        cascade.sample("house", steps=2)  # the encoder is there, too
        assert loads == ["text", 1, 2]
        cascade.sample("house", steps=2, tile=16)  # another use of the second stage
        assert loads == ["text", 1, 2, -2, 2]
        del loads[:]
    assert sorted(map(str, loads)) == ["-1", "-2", "-text"]
    del loads[:]
    assert pixels(cascade.sample(["sun", "key"], steps=2)) == first  # loaded anew
    assert loads == [1, 2]
    cascade.close()


def test_groups_of_one_call_share_what_is_loaded_and_free_it(run, loads, monkeypatch):
    monkeypatch.setattr(groups, "GROUP", 2)
    options = SamplingOptions.make(num=5, steps=1)
    made = list(TrainedStages.load(run).stream(["sun"], options))
    assert len(made) == 5
    assert loads == ["text", "-text", 1, 2, "text", "-text", "text", "-text", -1, -2]


def test_training_that_goes_on_is_seen(tmp_path, loads):
    write_run(tmp_path)
    with Cascade.load(tmp_path, runtime="torch") as cascade:
        before = pixels(cascade.sample("sun", steps=1))
        write_stage(tmp_path, 2, seed=3)
        assert pixels(cascade.sample("sun", steps=1)) != before
    assert loads[:5] == ["text", 1, 2, -2, 2]


def test_what_does_not_fit_beside_the_others_is_freed_first(run, loads, monkeypatch):
    monkeypatch.setattr(residents, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(Residents, "_taken_since", lambda self, before: 2000)
    with Cascade.load(run, runtime="torch") as cascade:
        first = pixels(cascade.sample("sun", steps=1))
        assert loads == ["text", "-text", 1, -1, 2, -2]
        assert pixels(cascade.sample("sun", steps=1)) == first
        assert loads[6:] == [1, -1, 2, -2]


def test_a_full_card_frees_what_is_held_and_goes_on_where_it_was(run, loads, monkeypatch):
    parts, calls = Stage.parts, []

    def full_once(self, inputs, *arguments, **options):
        calls.append((self.config.number, list(inputs.seeds)))
        for number, part in enumerate(parts(self, inputs, *arguments, **options)):
            if self.config.number == 2 and number == 1 and len(calls) == 2:
                raise torch.OutOfMemoryError("full")
            yield part

    with Cascade.load(run, runtime="torch") as cascade:
        expected = pixels(cascade.sample("sun", num=3, steps=1, at_once=1))
        del loads[:]
        monkeypatch.setattr(Stage, "parts", full_once)
        assert pixels(cascade.sample("sun", num=3, steps=1, at_once=1)) == expected
        assert calls == [(1, [0, 1, 2]), (2, [0, 1, 2]), (2, [1, 2])]
        assert loads == [-2, -1, "-text", 2]


def test_a_stage_that_is_tried_again_is_named_once(run, monkeypatch):
    parts, calls = Stage.parts, []

    def full_at_first(self, *arguments, **options):
        calls.append(self.config.number)
        if calls.count(2) == 1 and self.config.number == 2:
            raise torch.OutOfMemoryError("full")
        yield from parts(self, *arguments, **options)

    monkeypatch.setattr(Stage, "parts", full_at_first)
    with Cascade.load(run, runtime="torch") as cascade:
        (sample,) = cascade.stream("sun", steps=1)
    assert calls == [1, 2, 2] and len(sample.runtimes) == 2


def test_a_card_that_is_full_with_nothing_held_ends_in_advice(run, monkeypatch):
    def full(self, *arguments, **options):
        raise torch.OutOfMemoryError("full")
        yield

    monkeypatch.setattr(Stage, "parts", full)
    with (
        Cascade.load(run, runtime="torch") as cascade,
        pytest.raises(EnvironmentProblem, match="memory is too small"),
    ):
        cascade.sample("sun", steps=1)
    assert len(cascade._residents) == 0


def test_the_page_keeps_them_from_picture_to_picture(run, loads, tmp_path):
    import threading

    from imagen_scale.ui.generation import Generator, Made, Request

    generator = Generator(run)
    for seed in (0, 1):
        options = {"steps": 1, "seed": seed}
        *_, last = generator.generate(Request("sun", options, "torch"), threading.Event())
        assert isinstance(last, Made)
    assert loads == ["text", 1, 2]


def test_what_a_stage_was_seen_to_need_is_remembered(run):
    held = Residents(torch.device("cpu"))
    cascade = TrainedStages.load(run)
    cascade.residents = held
    list(cascade.stream(["sun"], SamplingOptions.make(steps=1)))
    assert len(held) == 2 and set(held._needs) == {str(file.path) for file in cascade.files}
    held.close()
    assert len(held) == 0


def test_on_a_card_a_stage_is_first_used_alone(run, loads):
    with Cascade.load(run, runtime="torch") as cascade:
        cascade._residents.is_scarce = True
        first = pixels(cascade.sample("sun", steps=1))
        assert loads == ["text", "-text", 1, -1, 2]
        del loads[:]
        for prompt in ("sun", "sun", "key", "key"):
            assert (pixels(cascade.sample(prompt, steps=1)) == first) == (prompt == "sun")
        assert loads == [1, "text"]  # from then on all of them stay
