"""What `Engine` promises, of DeepSpeed's engine at every ZeRO stage and of the one of our own."""

import json
from itertools import pairwise

import pytest
import torch
from support.tiny import TINY
from torch import nn

from imagen_scale.config import parse_config
from imagen_scale.planning.setup import written_setup
from imagen_scale.training.building import make_engine
from imagen_scale.training.ema import Ema
from imagen_scale.training.feed import Feed
from imagen_scale.training.in_backward import InBackwardEngine
from imagen_scale.training.shards import load_shards, save_shard
from imagen_scale.training.stepping import Stepper

CPU = {"device": "cpu"}
ENGINES = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2-offload": {"stage": 2, "offload_optimizer": CPU},
    "zero3-offload": {"stage": 3, "offload_optimizer": CPU},
    "in-backward": None,
}


def settings(zero):
    """Stage and setup in fp32, without what the optimizer inside backward cannot do."""
    training = TINY["training"] | {"grad_clip": None}
    data = TINY | {"training": training, "memory": {"optimizer_in_backward": zero is None}}
    if zero is not None:
        data["deepspeed"] = {"zero_optimization": zero}
    config = parse_config(json.dumps(data))
    return config.stage(1), written_setup(config.stage(1), 1, on_card=False)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.SiLU(), nn.BatchNorm1d(5), nn.Linear(5, 3))


@pytest.fixture(params=ENGINES)
def engine(request, process_group):
    engine = make_engine(network(), *settings(ENGINES[request.param]))
    yield engine
    engine.release()


def step(engine, spoiled=1.0):
    inputs = torch.randn(8, 7, generator=torch.Generator().manual_seed(1))
    engine.set_lr(1e-2)
    engine.backward(engine(inputs).square().mean() * spoiled)
    return engine.step()


def weights(engine):
    """The network's weights, through the masters."""
    return {
        name: engine.gather(parameter).detach().clone()
        for name, parameter in engine.module.named_parameters()
    }


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_one_step_gives_every_engine_the_weights_of_plain_adamw(engine):
    plain = network()
    stage, _ = settings({"stage": 0})
    optimizer = torch.optim.AdamW(
        plain.parameters(), lr=1e-2, betas=stage.training.betas,
        weight_decay=stage.training.weight_decay,
    )  # fmt: skip
    inputs = torch.randn(8, 7, generator=torch.Generator().manual_seed(1))
    plain(inputs).square().mean().backward()
    optimizer.step()
    assert step(engine) is True
    for name, value in weights(engine).items():
        torch.testing.assert_close(value, plain.get_parameter(name).data, atol=1e-6, rtol=0)


def test_a_step_that_is_not_finite_says_so_and_changes_nothing(engine):
    step(engine)
    before = weights(engine)
    masters = [master.detach().clone() for master in engine.masters()]
    assert step(engine, spoiled=float("inf")) is False
    assert equal(before, weights(engine))
    assert all(map(torch.equal, masters, engine.masters()))
    assert step(engine) is True
    assert not equal(before, weights(engine))


def test_fragments_cover_every_element_once_and_say_where_it_lies(engine):
    step(engine)
    masters, groups = engine.masters(), engine.groups()
    fragments = engine.fragments()
    assert len(masters) == len(groups) == len(fragments)
    whole, covered = weights(engine), {name: 0 for name in engine.shapes()}
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    for master, group, parts in zip(masters, groups, fragments, strict=True):
        assert {part.name for part in parts} == {names[parameter] for parameter in group}
        offsets = [(part.offset, part.offset + part.numel) for part in parts]
        assert all(a[1] <= b[0] for a, b in pairwise(offsets))
        for part in parts:
            ours = master.detach().view(-1)[part.offset : part.offset + part.numel]
            theirs = whole[part.name].view(-1)[part.start : part.start + part.numel]
            assert torch.equal(ours, theirs)
            covered[part.name] += part.numel
    assert covered == {name: shape.numel() for name, shape in engine.shapes().items()}
    assert engine.shapes() == {name: value.shape for name, value in network().named_parameters()}


def test_every_master_has_moments_and_a_changed_one_can_be_published(engine):
    step(engine)
    for i, master in enumerate(engine.masters()):
        assert {"exp_avg", "exp_avg_sq"} <= engine.optimizer_of(i).state[master].keys()
        with torch.no_grad():
            master.zero_()
    engine.publish()
    inputs = torch.ones(8, 7)
    engine.eval()
    assert torch.equal(engine(inputs), torch.zeros(8, 3))
    engine.train()


def test_nothing_is_left_of_a_released_engine(process_group):
    for zero in ENGINES.values():
        engine = make_engine(network(), *settings(zero))
        step(engine)
        masters, parameters = engine.masters(), list(engine.module.parameters())
        engine.release()
        assert sum(tensor.numel() for tensor in [*masters, *parameters]) == 0


def test_average_steps_and_shards_need_no_deepspeed(tmp_path):
    """Over the engine of our own, which knows nothing of it."""

    class Loss:
        def timed_losses(self, unet, batch):
            return unet(batch.images).square().mean(dim=1), torch.zeros(8)

    class Batch:
        positions = torch.arange(8)
        images = torch.randn(8, 7, generator=torch.Generator().manual_seed(2))

    def build():
        engine = InBackwardEngine(network(), *settings(None), torch.device("cpu"))
        return engine, Ema(engine, 0.9), Stepper(engine, Loss(), accumulation=1)

    def train(engine, ema, stepper, steps):
        for number in steps:
            stepped = stepper.step(Feed(iter([Batch]), engine.device), lr=1e-2)
            assert stepped.applied and stepped.positions == list(range(8))
            ema.update(number)
        return dict(ema.named_weights())

    engine, ema, stepper = build()
    train(engine, ema, stepper, (1, 2))
    save_shard(engine, [ema], "adamw", tmp_path / "rank_0000.safetensors")
    expected = train(engine, ema, stepper, (3,))
    buffers = {name: value.clone() for name, value in engine.module.named_buffers()}
    again, average, stepper = build()
    load_shards(again, [average], "adamw", tmp_path)
    again.publish()
    found = train(again, average, stepper, (3,))
    trained = [name for name in expected if name not in buffers]  # U-Nets have no buffers
    assert equal({name: found[name] for name in trained}, {n: expected[n] for n in trained})
