"""How often the host waits for the card in a step, counted where both are the same processor."""

import json

import pytest
import torch
from support.tiny import TINY
from support.waits import Waits

from imagen_scale.config import parse_config
from imagen_scale.data.sequence import Batch
from imagen_scale.planning.setup import written_setup
from imagen_scale.training.building import build_unet, make_engine
from imagen_scale.training.feed import Feed
from imagen_scale.training.objective import Objective
from imagen_scale.training.stepping import Stepper

OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
# ZeRO stage or settings, precision: reads of ours in a step, and of DeepSpeed's.
ENGINES = {
    "zero0": ({"stage": 0}, "fp32", 1, 0),  # whether the gradients are finite
    "zero1": ({"stage": 1}, "fp32", 0, 2),  # the same, as the norm tells
    "zero1-bf16": ({"stage": 1}, "bf16", 0, 3),
    "zero2-bf16": ({"stage": 2}, "bf16", 0, 3),
    "in-backward": (None, "fp32", 1, 0),
}


class Trained:
    """The super-resolution U-Net of TINY, with crops, and its stepper."""

    def __init__(self, zero, precision="fp32", accumulation=1):
        training = TINY["training"] | {
            "precision": precision, "global_batch": 2 * accumulation, "micro_batch": 2,
            "grad_clip": None if zero is None else 1.0,
        }  # fmt: skip
        unets = [TINY["unets"][0], TINY["unets"][1] | {"crop": 16}]
        data = TINY | {
            "unets": unets, "training": training,
            "memory": {"optimizer_in_backward": zero is None},
        }  # fmt: skip
        if zero is not None:
            data["deepspeed"] = {"zero_optimization": zero}
        stage = parse_config(json.dumps(data)).stage(2, 384)
        setup = written_setup(stage, 1, on_card=False)
        self.engine = make_engine(build_unet(stage, setup), stage, setup)
        self.stepper = Stepper(self.engine, Objective(stage, self.engine.device), accumulation)

    def step(self):
        batches = [self._batch(i) for i in range(self.stepper.accumulation)]
        with Waits(*[batch.positions for batch in batches]) as waits:
            assert self.stepper.step(Feed(iter(batches), self.engine.device), lr=1e-3).applied
        return waits

    def _batch(self, number):
        text = torch.rand(2, 8, 384), torch.ones(2, 8, dtype=torch.bool)
        images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
        return Batch(images, *text, torch.arange(2) + 2 * number, ["x"] * 2)


@pytest.mark.parametrize("name", ENGINES)
def test_a_step_waits_for_nothing_but_whether_its_gradients_are_finite(name, process_group):
    zero, precision, ours, deepspeeds = ENGINES[name]
    trained = Trained(zero, precision, accumulation=1 if zero is None else 2)
    trained.step()
    waits = trained.step()
    trained.engine.release()
    assert (waits.of("imagen_scale"), waits.of("deepspeed")) == (ours, deepspeeds), waits.found
    assert sum(waits.found.values()) == ours + deepspeeds


def test_offloaded_gradients_are_not_waited_for_in_backward(process_group):
    """DeepSpeed would look at each; it reads their norms after backward, where nothing waits."""
    trained = Trained(OFFLOADED, "bf16", accumulation=2)
    number = len(list(trained.engine.module.parameters()))
    trained.step()
    waits = trained.step()
    trained.engine.release()
    assert waits.of("imagen_scale") == 0
    assert waits.of("deepspeed") == sum(waits.found.values()) == number + 4
    assert not any("overflow_tracker" in place for _, place in waits.found), waits.found


def test_what_is_counted_is_what_makes_the_host_wait():
    values = torch.arange(4.0)
    with Waits(values[:1].clone()) as waits:
        values.sum().item()
        bool(values.isfinite().all())
        values.tolist()
        values.nonzero()
        float(values.exp().max())
    assert sum(waits.found.values()) == 5
    with Waits(values) as waits:
        values.tolist()
    assert not waits.found
