"""Gradients of many micro-batches are added up in fp32."""

import json

import pytest
import torch
from support.tiny import TINY

from imagen_scale.config import parse_config
from imagen_scale.models.unet import UNet
from imagen_scale.planning.setup import written_setup
from imagen_scale.training.building import make_engine

SMALLEST = {
    "dim": 8, "dim_mults": [1], "num_resnet_blocks": 1, "max_text_len": 8,
    "layer_attns": False, "layer_cross_attns": False, "attend_at_middle": False,
}  # fmt: skip
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ZERO = {
    "1": {"stage": 1},  # raised to 2
    "2": {"stage": 2},
    "2-offload": {"stage": 2, **OFFLOAD},
    "3": {"stage": 3},
    "3-offload": {"stage": 3, **OFFLOAD},
}


def gradients(zero, accumulation, optimizer="adamw", precision="bf16"):
    """What the optimizer was given after a step of equal micro-batches, and the norm of it."""
    training = TINY["training"] | {
        "precision": precision, "micro_batch": 1, "global_batch": accumulation,
        "optimizer": optimizer, "grad_clip": None,
    }  # fmt: skip
    changed = {
        "imagen": TINY["imagen"] | {"image_sizes": [8]}, "unets": [SMALLEST],
        "training": training, "deepspeed": {"zero_optimization": zero},
    }  # fmt: skip
    stage = parse_config(json.dumps(TINY | changed)).stage(1, 384)
    setup = written_setup(stage, 1, on_card=False)
    torch.manual_seed(0)
    engine = make_engine(UNet(stage.network), stage, setup)
    found = []
    engine.optimizer_of(0).register_step_pre_hook(
        lambda optimizer, *_: found.extend(
            p.grad.detach().float().clone()
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        )
    )
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(1, 3, 8, 8, generator=generator)
    inputs = (
        torch.tensor([50]), torch.randn(1, 8, 384, generator=generator),
        torch.ones(1, 8, dtype=torch.bool), torch.ones(1, dtype=torch.bool),
    )  # fmt: skip
    for _ in range(accumulation):
        engine.backward(engine(x_t, *inputs).float().square().mean())
        engine.step()
    norm = engine.grad_norm()
    engine.release()
    return torch.cat([gradient.flatten() for gradient in found]), norm


@pytest.mark.parametrize("name", ZERO)
def test_equal_micro_batches_give_the_gradient_of_one_bit_for_bit(name, process_group):
    """Each is divided by a power of two, and so many bf16 numbers fit into an fp32 sum exactly."""
    one, norm = gradients(ZERO[name], 1)
    assert one.abs().max() > 0
    for accumulation in {"3": (256,), "3-offload": (64,)}.get(name, (64, 256)):  # 3 takes long here
        many, norm_of_many = gradients(ZERO[name], accumulation)
        assert torch.equal(many, one)
        assert norm_of_many == norm


def test_masters_in_bf16_get_the_sum_too(process_group):
    one, _ = gradients(ZERO["2-offload"], 1, "adamw_bf16")
    many, _ = gradients(ZERO["2-offload"], 64, "adamw_bf16")
    assert torch.equal(many, one)
