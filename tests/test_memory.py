"""What is traded for memory changes no gradient: checkpointing, offload, optimizers, crops."""

import json
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open
from support.networks import make_inputs, make_unet
from support.tiny import TINY

from imagen_scale.config import parse_config
from imagen_scale.data.sequence import Batch
from imagen_scale.diffusion.lowres import shrink_and_enlarge
from imagen_scale.files import pinning
from imagen_scale.files import tensors as writing
from imagen_scale.files.tensors import write_tensors
from imagen_scale.models import memory
from imagen_scale.models.memory import apply_checkpointing, in_host_memory
from imagen_scale.planning.activations import _Parked
from imagen_scale.planning.live_bytes import LiveBytes
from imagen_scale.planning.setup import written_setup
from imagen_scale.training.matrix_optimizers import MatrixAdafactor, Muon
from imagen_scale.training.memory_use import is_out_of_memory
from imagen_scale.training.objective import Objective, crop_at
from imagen_scale.training.optimizers import (
    GROUP_ELEMENTS,
    bounded_groups,
    make_optimizer,
    parameter_groups,
)

LEVELS = [("norms", "norms"), ("blocks", "blocks"), ("blocks", "norms"), ("none", "blocks")]


def step(unet, index):
    """Bytes held between forward and backward of one training step."""
    inputs = make_inputs(index) | {"keep_mask": torch.tensor([True, False, True])}
    with LiveBytes() as live:
        loss = unet(**inputs).square().mean()
        held = live.now
        loss.backward()
    return held


@pytest.mark.parametrize("levels", LEVELS, ids="/".join)
@pytest.mark.parametrize("hold", [nullcontext, in_host_memory], ids=["card", "host"])
@pytest.mark.parametrize(
    ("index", "memory_efficient"), [(0, False), (0, True), (1, False), (1, True)]
)
def test_checkpointing_changes_no_gradient(index, memory_efficient, levels, hold):
    changes = {
        "memory_efficient": memory_efficient, "num_resnet_blocks": [1, 2], "layer_attns": True,
        "attend_at_middle": True,
    }  # fmt: skip
    plain, saving = make_unet(index, **changes).train(), make_unet(index, **changes).train()
    apply_checkpointing(saving, levels, hold=hold)
    assert step(saving, index) < step(plain, index)
    for (name, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


CONVOLUTIONS = {
    "dim": 32, "num_resnet_blocks": 2, "layer_attns": False, "layer_cross_attns": False,
    "attend_at_middle": False,
}  # fmt: skip


def test_each_level_holds_less_than_the_one_before():
    held = {}
    for level in ("none", "norms", "blocks"):
        unet = make_unet(0, **CONVOLUTIONS).train()
        held[level] = step(apply_checkpointing(unet, (level, level)), 0)
    mixed = make_unet(0, **CONVOLUTIONS).train()
    held["mixed"] = step(apply_checkpointing(mixed, ("blocks", "norms")), 0)
    assert held["blocks"] < held["mixed"] < held["norms"] < 0.6 * held["none"]


def test_offload_takes_the_features_and_not_what_blocks_share():
    parked = _Parked()
    unet = make_unet(0, **CONVOLUTIONS).train()
    apply_checkpointing(unet, ("blocks", "blocks"), hold=parked.hold)
    held = step(unet, 0)
    on_card = make_unet(0, **CONVOLUTIONS).train()
    alone = step(apply_checkpointing(on_card, ("blocks", "blocks")), 0)
    assert parked.bytes > 0.4 * alone
    assert held < 0.6 * alone


def test_sampling_is_not_recomputed():
    unet = apply_checkpointing(make_unet(0), ("blocks", "blocks")).eval()
    with torch.no_grad():
        out = unet(**make_inputs(0))
        assert torch.equal(out, make_unet(0).eval()(**make_inputs(0)))


# Optimizers.


def test_adafactor_factors_a_convolution_as_a_matrix():
    torch.manual_seed(0)
    conv = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
    matrix = torch.nn.Parameter(conv.detach().clone().reshape(6, 36))
    bias = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    ours = MatrixAdafactor([conv, bias[0]], lr=0.01)
    theirs = torch.optim.Adafactor([matrix, bias[1]], lr=0.01)
    for _ in range(3):
        gradient = torch.randn(6, 36)
        conv.grad, matrix.grad = gradient.reshape(6, 4, 3, 3), gradient
        for b in bias:
            b.grad = torch.arange(5.0)
        ours.step()
        theirs.step()
    assert conv.shape == (6, 4, 3, 3)
    assert torch.equal(conv.reshape(6, 36), matrix)
    assert torch.equal(*bias)
    state = ours.state[conv]
    assert state["row_var"].numel() + state["col_var"].numel() == 6 + 36


def test_muon_moves_a_convolution_as_a_matrix_and_the_rest_as_adamw_does():
    torch.manual_seed(0)
    unet, options = make_unet(0), ("training.optimizer=muon", "training.weight_decay=0.1")
    stage = parse_config(json.dumps(TINY), overrides=options).stage(1)
    setup = written_setup(stage, 1, on_card=False)
    optimizer = make_optimizer(unet.named_parameters(), stage, setup)
    assert isinstance(optimizer, Muon) and setup.zero_stage == 0
    inputs = {name: p.detach().clone() for name, p in unet.named_parameters()}
    copies = {name: torch.nn.Parameter(p.flatten(1) if is_muon(name, p) else p.clone())
              for name, p in inputs.items()}  # fmt: skip
    hidden = [copies[name] for name, p in inputs.items() if is_muon(name, p)]
    others = [copies[name] for name, p in inputs.items() if not is_muon(name, p)]
    options = {"lr": stage.lr, "weight_decay": 0.1}
    theirs = [torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw", **options),
              torch.optim.AdamW(others, betas=stage.training.betas, **options)]  # fmt: skip
    for _ in range(2):
        for name, parameter in unet.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            copies[name].grad = parameter.grad.reshape(copies[name].shape).clone()
        for one in (optimizer, *theirs):
            for group in one.param_groups:
                group["lr"] = 1e-3
            one.step()
    for name, parameter in unet.named_parameters():
        assert torch.allclose(parameter, copies[name].reshape(parameter.shape), atol=1e-6), name
        assert ("momentum_buffer" in optimizer.state[parameter]) == is_muon(name, parameter)
    assert 0.9 < sum(p.numel() for p in hidden) / sum(p.numel() for p in copies.values()) < 1


def is_muon(name, parameter):
    """Hidden matrices, counted by hand: not what touches pixels, nor tables and scales."""
    outer = name.startswith(("init_conv", "final_conv"))
    kept_out = name.endswith(("null_text_embed", "null_text_hidden", "null_kv", ".g"))
    return parameter.ndim > 1 and not outer and not kept_out


def test_what_is_no_matrix_need_not_decay():
    unet = make_unet(0)
    stage = parse_config(json.dumps(TINY)).stage(1)
    together = parameter_groups(unet.named_parameters(), stage)
    assert [set(group) for group in together] == [{"params"}]  # as it always was
    config = parse_config(json.dumps(TINY), overrides=("training.decay_matrices_only=true",))
    decayed, kept = parameter_groups(unet.named_parameters(), config.stage(1))
    named = dict(unet.named_parameters())
    assert kept["weight_decay"] == 0 and "weight_decay" not in decayed
    assert {id(p) for p in kept["params"]} == {
        id(p) for name, p in named.items()
        if p.ndim == 1 or name.endswith(("null_text_embed", "null_text_hidden", "null_kv", ".g"))
    }  # fmt: skip
    assert len(decayed["params"]) + len(kept["params"]) == len(named)


def test_parameters_are_grouped_in_order_and_bounded():
    sizes = [GROUP_ELEMENTS // 2, GROUP_ELEMENTS // 2, 1, 3 * GROUP_ELEMENTS, 5]
    with torch.device("meta"):
        parameters = [torch.nn.Parameter(torch.empty(size)) for size in sizes]
    groups = bounded_groups(parameters)
    assert [p for group in groups for p in group["params"]] == parameters
    assert [len(group["params"]) for group in groups] == [2, 2, 1]


# Crops.


def cropping(crop):
    unets = [TINY["unets"][0], TINY["unets"][1] | {"crop": crop}]
    return Objective(
        parse_config(json.dumps(TINY | {"unets": unets})).stage(2), torch.device("cpu")
    )


def test_a_crop_is_the_same_window_of_picture_and_condition():
    """Seen by the network: the picture, and the condition of the whole picture, cut together."""
    objective = cropping(8)
    pictures = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    positions = torch.arange(4)
    draws = objective.draw(positions, pictures.shape[1:], "train")
    seen = {}

    def network(x_t, t, embeds, mask, keep, lowres_img, lowres_t):
        seen.update(x_t=x_t, lowres_img=lowres_img)
        return torch.zeros_like(x_t)

    text = torch.zeros(4, 4, 384), torch.ones(4, 4, dtype=torch.bool)
    objective.loss(network, Batch(pictures, *text, positions, ["x"] * 4))
    windows = crop_at(pictures, draws.corners, 8)
    expected = objective.schedule.q_sample(windows, draws.t, draws.eps)
    assert torch.equal(seen["x_t"], expected)
    small = crop_at(shrink_and_enlarge(pictures, 16), draws.corners, 8)
    noised = objective.schedule.q_sample(small, draws.lowres_t, draws.lowres_eps)
    assert torch.equal(seen["lowres_img"], noised)


def test_crops_are_everywhere_on_the_grid_of_low_resolution_pixels():
    corners = cropping(8).draw(torch.arange(2500), torch.Size((3, 8, 8)), "train").corners
    assert corners.unique().tolist() == list(range(0, 25, 2))
    assert len(corners.unique(dim=0)) == 13 * 13


# Memory that cannot be pinned, or is full.


def test_nothing_is_pinned_under_wsl(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "save_on_cpu", lambda pin_memory: asked.append(pin_memory))
    for release in ("6.8.0-generic", "5.15.153.1-microsoft-standard-WSL2"):
        monkeypatch.setattr(pinning.platform, "release", lambda release=release: release)
        in_host_memory()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    in_host_memory()
    assert asked == [True, False, False]


@pytest.mark.parametrize(("error", "expected"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
    (MemoryError(), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
    (RuntimeError("GET was unable to find an engine to execute this computation"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), False),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
    (RuntimeError("shapes do not match"), False),
    (ValueError("CUDNN_STATUS_ALLOC_FAILED"), False),
])  # fmt: skip
def test_what_is_said_when_memory_is_full(error, expected):
    assert is_out_of_memory(error) is expected


# Files written a tensor at a time.


def test_a_tensor_file_is_what_the_library_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "bf16": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3.0),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "strided": torch.randn(4, 6).t(),
        "flags": torch.tensor([True, False]),
    }
    path = tmp_path / "file.safetensors"
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_tensors(path, shapes, iter(tensors.items()), {"what": "test ü"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"what": "test ü"}
        assert sorted(file.keys()) == sorted(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype


@pytest.mark.parametrize("wrong", [[], [("b", torch.zeros(2))], [("a", torch.zeros(3))]])
def test_a_tensor_file_is_never_silently_wrong(wrong, tmp_path):
    with pytest.raises(AssertionError):
        write_tensors(tmp_path / "x", {"a": (torch.float32, (2,))}, wrong, {})


def test_a_large_tensor_is_brought_to_the_disk_in_pieces(tmp_path, monkeypatch):
    """A disk that writes is told from one that stands still while a checkpoint is written."""
    monkeypatch.setattr(writing, "PIECE_BYTES", 1000)
    path, synced = tmp_path / "weights", []
    monkeypatch.setattr(writing.os, "fsync", lambda number: synced.append(path.stat().st_size))
    tensors = {"a": torch.arange(1234.0), "b": torch.arange(100.0), "c": torch.arange(400.0)}
    shapes = {name: (torch.float32, tensor.shape) for name, tensor in tensors.items()}
    write_tensors(path, shapes, tensors.items(), {})
    assert len(synced) == 6
    assert all(after - before < 2000 for before, after in pairwise(synced))
    with safe_open(path, "pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)
