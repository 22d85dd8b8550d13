"""What `training` says of torch's own ways to compute: each acts, none outlives its U-Net."""

import json
from functools import partialmethod

import pytest
import torch
from support.tiny import TINY
from torch import nn

from imagen_scale.config import parse_config
from imagen_scale.data.sequence import Batch
from imagen_scale.errors import ConfigError
from imagen_scale.models.layers import ChanLayerNorm
from imagen_scale.planning.setup import written_setup
from imagen_scale.training.building import build_unet, make_engine
from imagen_scale.training.objective import Objective
from imagen_scale.training.switches import prepare_determinism, switched

SMALL = {"dim": 8, "dim_mults": [1], "layer_attns": True, "layer_cross_attns": True,
         "attn_heads": 1, "max_text_len": 8}  # fmt: skip


def config(memory=None, zero=None, precision="fp32", **training):
    data = TINY | {
        "imagen": TINY["imagen"] | {"image_sizes": [8]}, "unets": [SMALL],
        "training": TINY["training"] | {"precision": precision, **training},
        "memory": memory or {}, "deepspeed": {} if zero is None else {"zero_optimization": zero},
    }  # fmt: skip
    return parse_config(json.dumps(data))


def switches():
    return (
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )  # fmt: skip


@pytest.mark.parametrize(("training", "expected"), [
    ({}, (True, True, False, False, False, True)),
    ({"tf32": False}, (False, False, False, False, False, True)),
    ({"cudnn_benchmark": True}, (True, True, True, False, False, True)),
    ({"deterministic": True}, (True, True, False, True, True, False)),
])  # fmt: skip
def test_torch_is_told_and_told_back(training, expected):
    before = switches()
    with pytest.raises(ZeroDivisionError), switched(config(**training).training):
        assert switches() == expected
        1 / 0  # noqa: B018
    assert switches() == before


def test_cublas_is_told_unless_the_user_did(monkeypatch):
    import os

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    prepare_determinism(config().training)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    prepare_determinism(config(deterministic=True).training)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    prepare_determinism(config(deterministic=True).training)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(("changes", "said"), [
    ({"compile": True, "zero": {"stage": 3}}, "zero_optimization.stage to 2 or less"),
    ({"compile": True, "grad_clip": None, "memory": {"optimizer_in_backward": True}},
     "memory.optimizer_in_backward acts between"),
    ({"compile": True, "memory": {"offload_activations": True}},
     "memory.offload_activations acts between"),
    ({"deterministic": True, "cudnn_benchmark": True}, "training.cudnn_benchmark"),
])  # fmt: skip
def test_what_excludes_each_other_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        config(**changes)


def test_a_setup_that_was_chosen_is_refused_too():
    stage = config(compile=True).stage(1, 384)
    setup = written_setup(stage, 1, on_card=False)
    for change in ({"zero": {"stage": 3}}, {"in_backward": True}, {"offload_activations": True}):
        with pytest.raises(ConfigError, match=r"training\.compile: the setup chosen here"):
            build_unet(stage, setup._replace(**change))


def batch(tokens):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=generator)
    text = torch.randn(4, tokens, 384, generator=generator).half()
    mask = torch.ones(4, tokens, dtype=torch.bool)
    return Batch(images, text, mask, torch.arange(4), ["x"] * 4)


def trained(tokens=(5, 7, 6), **changes):
    """Losses of steps whose texts differ in length, and the names of the weights.

    Later losses say how earlier steps changed the weights; not one by one, for AdamW makes whole
    steps of rounding where a gradient is zero, as before a normalisation.
    """
    stage = config(micro_batch=4, global_batch=4, **changes).stage(1, 384)
    setup = written_setup(stage, 1, on_card=False)
    engine = make_engine(build_unet(stage, setup), stage, setup)
    objective = Objective(stage, engine.device)
    losses = []
    for number in tokens:
        losses.append(objective.losses(engine, batch(number)))
        engine.backward(losses[-1].mean())
        engine.step()
    names = list(engine.module.state_dict())
    engine.release()
    return torch.stack(losses).detach(), names


def agree(a, b, tolerance=2e-5):
    assert a[1] == b[1]
    assert (a[0][1:] - a[0][:-1]).abs().min() > 1e-2  # something is learned
    torch.testing.assert_close(a[0][0], b[0][0], atol=5e-6, rtol=0)
    torch.testing.assert_close(a[0], b[0], atol=tolerance, rtol=0)


@pytest.fixture
def without_kernels(monkeypatch):
    """Everything of torch.compile but the kernels, which take a C++ compiler minutes here."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_compiled_network_learns_the_same_under_the_same_names(
    stage, process_group, without_kernels
):
    """With recomputation, which is the default; compiled once for texts of any length."""
    zero = {"stage": stage}
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    ours = trained(zero=zero, compile=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    agree(trained(zero=zero), ours)
    assert graphs == 1  # no break in it, no second shape


@pytest.mark.slow
def test_the_kernels_compute_the_same(process_group):
    agree(trained(), trained(compile=True), tolerance=1e-4)


@pytest.mark.parametrize("number", [1, 2])
def test_activations_keep_their_layout_from_end_to_end(number):
    """What every convolution reads, in the base and in super-resolution, crops included."""
    data = TINY | {"training": TINY["training"] | {"channels_last": True}}
    data["unets"] = [TINY["unets"][0], TINY["unets"][1] | {"crop": 16, "layer_attns": True}]
    stage = parse_config(json.dumps(data)).stage(number, 384)
    unet = build_unet(stage, written_setup(stage, 1, on_card=False))
    seen = []
    for module in unet.modules():
        if isinstance(module, nn.Conv2d | ChanLayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()[1]))
    images = torch.randint(256, (4, 3, stage.size, stage.size), dtype=torch.uint8)
    Objective(stage, torch.device("cpu")).losses(unet, batch(5)._replace(images=images))
    assert set(seen) == {1}  # from a channel to the next


def test_activations_in_another_layout_learn_the_same(process_group):
    agree(trained(), trained(channels_last=True))
