"""fp16 with DeepSpeed's dynamic loss scale, for cards without bf16.

DeepSpeed refuses fp16 on a CPU because it is slow there; the computation is the real one.
"""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from support import ranks
from support.ranks import Small, equal

from imagen_scale.training.feed import Feed
from imagen_scale.training.skipped_steps import SkippedSteps

ZERO = {"1": (1, False), "2": (2, False), "2-offload": (2, True), "3-offload": (3, True)}
HUGE = 1e30


@pytest.fixture(autouse=True)
def on_cpu(process_group, monkeypatch):
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


def small(name="1", **options):
    stage, offload = ZERO[name]
    return Small(stage, "fp16", offload=offload, **options)


def watched():
    """A count of steps left out, and what is said and written."""
    said, rows = [], []
    stage = SimpleNamespace(name="U-Net 1", training=SimpleNamespace(max_skipped=3))
    source = SimpleNamespace(keys=[f"picture {i}" for i in range(100)])
    job = SimpleNamespace(
        stage=stage, say=said.append, prepared=SimpleNamespace(source=source),
        samples=SimpleNamespace(train=SimpleNamespace(picture=lambda position: position)),
    )  # fmt: skip
    telemetry = SimpleNamespace(write=lambda step, **row: rows.append((step, row)))
    return SkippedSteps(job), telemetry, said, rows


def scaled(trained, factor):
    """Makes the loss of one step larger, as far as the gradient can see."""
    losses = trained.objective.timed_losses

    class Louder(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * factor

    def changed(*inputs):
        trained.objective.timed_losses = losses
        found = losses(*inputs)
        return found._replace(values=Louder.apply(found.values))

    trained.objective.timed_losses = changed


@pytest.mark.parametrize("name", ZERO)
def test_it_learns_what_fp32_learns(name):
    half, full = small(name), Small(1, "fp32")
    for _ in range(4):
        loss, applied = half.step()
        wanted, _ = full.step()
        assert applied
        assert loss == pytest.approx(wanted, rel=3e-3)
    assert half.engine.loss_scale == 2**16
    assert half.engine.module.final_conv.weight.dtype == torch.float16
    assert all(master.dtype == torch.float32 for master in half.engine.masters())
    assert half.engine.grad_norm() == pytest.approx(full.engine.grad_norm(), rel=0.02)
    half.release()
    full.release()


@pytest.mark.parametrize("name", ZERO)
def test_an_overflow_is_no_fault_lowers_the_scale_and_reaches_nothing(name):
    trained = small(name)
    skipped, telemetry, said, rows = watched()
    trained.step()
    for step in range(1, 5):  # more than max_skipped; two are allowed before the scale is halved
        before, average = trained.masters(), trained.average()
        scale = trained.engine.loss_scale
        scaled(trained, HUGE)
        stepped = trained.stepper.step(batches(trained), lr=1e-3)
        assert not stepped.applied
        assert skipped.tell(step, stepped, telemetry) is None
        assert equal(before, trained.masters()) and equal(average, trained.average())
        assert trained.engine.loss_scale == (scale if step == 1 else scale / 2)
    assert said[0] == (
        "U-Net 1: step 1 left out: a gradient overflowed fp16 at loss scale 65536, which is lowered"
    )
    assert rows[-1] == (4, {"overflow": 1})
    assert trained.step()[1]
    trained.release()


def batches(trained):
    return Feed(iter([trained.batch(0), trained.batch(4)]), torch.device("cpu"))


def test_at_the_smallest_scale_an_overflow_counts_and_nothing_is_raised():
    trained = small()
    skipped, telemetry, said, _ = watched()
    trained.engine.load_loss_scale(trained.engine.loss_scale_state() | {"cur_scale": 1.0})
    found = None
    for step in range(1, 4):
        scaled(trained, HUGE)
        stepped = trained.stepper.step(batches(trained), lr=1e-3)
        assert not stepped.applied
        found = skipped.tell(step, stepped, telemetry)
    assert "3 steps in a row left out; of the last a gradient was not finite" in found
    assert said[-1].startswith("WARNING")
    trained.release()


def test_a_loss_that_is_not_a_number_counts_and_its_picture_is_named():
    trained = small()
    skipped, telemetry, said, rows = watched()

    def spoiled():
        for batch in batches(trained):
            batch.images[-1, 0, 3, 3] = float("nan")
            yield batch

    stepped = trained.stepper.step(Feed(spoiled(), torch.device("cpu")), lr=1e-3)
    assert not stepped.applied
    assert skipped.tell(1, stepped, telemetry) is None
    assert "the loss of picture 3, picture 7 was not finite" in said[0]
    assert rows == [(1, {"skipped": 1})]
    trained.release()


@pytest.mark.parametrize("where", ["data", "loss", "gradient"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_is_not_a_number_reaches_nothing(stage, where):
    *_, skipped, untouched, goes_on = ranks._spoiled(stage, "fp16", 1.0, where, rank=0)
    assert skipped and untouched and goes_on


def test_a_continued_run_goes_on_with_the_scale_bit_for_bit(tmp_path):
    def run(trained, steps):
        losses = []
        for step in steps:
            if step in (1, 2, 5):
                scaled(trained, HUGE)
            losses.append(trained.step())
        return losses

    whole = small("2-offload")
    run(whole, range(3))
    whole.save(tmp_path)
    state = whole.engine.loss_scale_state()
    assert state["cur_scale"] == 2**15
    wanted = run(whole, range(3, 7))
    again = small("2-offload")
    again.load(tmp_path, 3)
    again.engine.load_loss_scale(state)
    assert run(again, range(3, 7)) == wanted
    assert again.engine.loss_scale_state() == whole.engine.loss_scale_state()
    assert equal(again.masters(), whole.masters())
    whole.release()
    again.release()
