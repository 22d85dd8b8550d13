"""DeepSpeed's engine in this process: EMA, refused pickles, build locks, batch arithmetic."""

import json

import pytest
import torch
from support.tiny import TINY

from imagen_scale.config import parse_config
from imagen_scale.errors import ConfigError, EnvironmentProblem
from imagen_scale.models.unet import UNet
from imagen_scale.planning.setup import written_setup
from imagen_scale.training import building, operators, ranks, zero_engine
from imagen_scale.training.ema import Ema
from imagen_scale.training.rates import learning_rate

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
STAGES = {
    "zero0": ({"stage": 0}, "fp32"),
    "zero1": ({"stage": 1}, "fp32"),
    "zero2-offload-bf16": ({"stage": 2, **OFFLOAD}, "bf16"),
    "zero3-offload-bf16": (
        {"stage": 3, **OFFLOAD, "offload_param": {"device": "cpu"}},
        "bf16",
    ),
}


def make_config(zero, precision="fp32", **training):
    changed = TINY["training"] | {"precision": precision, "micro_batch": 4} | training
    return parse_config(
        json.dumps(TINY | {"training": changed, "deepspeed": {"zero_optimization": zero}})
    )


def make_engine(config):
    setup = written_setup(config.stage(1), 1, on_card=False)
    return building.make_engine(UNet(config.stage(1, 384).network), config.stage(1, 384), setup)


@pytest.mark.parametrize("name", STAGES)
def test_ema_is_the_average_of_a_full_copy_and_leaves_the_masters_alone(name, process_group):
    config = make_config(*STAGES[name])
    torch.manual_seed(0)
    engine = make_engine(config)
    ema = Ema(engine, decay=0.9)

    def masters():
        """The fp32 masters by name, read as the average is: through the same gathering."""
        probe = Ema(engine, decay=0.9)
        return dict(probe.named_weights())

    average = masters()
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 4):
        for _ in range(2):
            x_t = torch.randn(4, 3, 16, 16, generator=generator)
            embeds = torch.randn(4, 5, 384, generator=generator)
            keep = torch.tensor([True, True, False, True])
            out = engine(x_t, torch.arange(4), embeds, torch.ones(4, 5, dtype=torch.bool), keep)
            engine.backward(out.float().square().mean())
            engine.step()
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for key, value in masters().items():
            average[key] = torch.lerp(average[key], value, 1 - decay)

    before = [shard.detach().clone() for shard in engine.masters()]
    found = dict(ema.named_weights())
    assert found.keys() == dict(UNet(config.stage(1, 384).network).state_dict()).keys()
    for key, value in average.items():
        torch.testing.assert_close(found[key], value, atol=1e-7, rtol=0)
    for shard, kept in zip(engine.masters(), before, strict=True):
        assert torch.equal(shard, kept)
    moved = sum((found[key] - masters()[key]).abs().sum() for key in found)
    assert moved > 0
    engine.release()


def test_locks_of_killed_builds_are_removed_and_those_in_use_are_kept(tmp_path):
    for operator in ("dead", "alive"):
        (tmp_path / operator).mkdir()
        (tmp_path / operator / "lock").touch()
    told = []
    with (tmp_path / "alive" / "lock").open():
        operators.clear_stale_locks(tmp_path, told.append)
    assert not (tmp_path / "dead" / "lock").exists()
    assert (tmp_path / "alive" / "lock").exists()
    assert len(told) == 1
    assert "dead" in told[0]


def test_locks_in_use_are_kept_through_a_symlink_too(tmp_path, monkeypatch):
    (tmp_path / "real" / "alive").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "link"))
    with (tmp_path / "link" / "alive" / "lock").open("w"):
        for folder in (tmp_path / "link", operators.extensions_dir()):
            operators.clear_stale_locks(folder, print)
        assert (tmp_path / "real" / "alive" / "lock").exists()


def test_what_deepspeed_itself_refuses_is_a_sentence(process_group):
    bad = {"zero_optimization": {"stage": 2, "reduce_bucket_sise": 5}}  # past our own check
    config = make_config({"stage": 2}).model_copy(update={"deepspeed": bad})
    with pytest.raises(ConfigError, match=r"(?s)refuses the configuration.*reduce_bucket_sise"):
        make_engine(config)


def test_a_failure_on_one_rank_is_raised_with_its_cause(process_group, capsys):
    def full():
        raise OSError(28, "No space left on device", "/somewhere")

    for run in (ranks.together, ranks.from_rank_0):
        with pytest.raises(EnvironmentProblem, match="process 0: OSError.*No space left"):
            run(full)


def test_batches_are_stated_once():
    config = make_config({"stage": 2})
    setup = written_setup(config.stage(1), 2, on_card=False)
    settings = zero_engine.engine_config(config.stage(1), setup, num_parameters=5000)
    assert settings["train_batch_size"] == 8
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 1
    assert settings["zero_optimization"] == {
        "stage": 2, "reduce_bucket_size": 5120, "allgather_bucket_size": 5120,
        "overlap_comm": False,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="8 is not a multiple of micro_batch 4 x 3 processes"):
        written_setup(config.stage(1), 3, on_card=False)


def test_learning_rate():
    config = make_config({"stage": 0}, steps=100, warmup_steps=10, lr=1.0)
    assert learning_rate(config.stage(1), 0) == pytest.approx(0.1)
    assert learning_rate(config.stage(1), 9) == pytest.approx(1.0)
    assert learning_rate(config.stage(1), 10) == pytest.approx(1.0)
    assert learning_rate(config.stage(1), 55) == pytest.approx(0.5)
    assert learning_rate(config.stage(1), 99) < 0.001
    constant = make_config({"stage": 0}, steps=100, lr_schedule="constant", lr=[1.0, 2.0])
    assert learning_rate(constant.stage(2), 99) == 2.0


def test_a_stable_rate_comes_down_in_the_last_fifth():
    config = make_config({"stage": 0}, steps=[100, 1], warmup_steps=[10, 0], lr=1.0,
                         lr_schedule="wsd")  # fmt: skip
    rates = [learning_rate(config.stage(1), step) for step in range(100)]
    assert rates[9:81] == [1.0] * 72
    assert rates[80:] == pytest.approx([(20 - n) / 20 for n in range(20)])
    assert learning_rate(config.stage(2), 0) == 1.0
    late = make_config({"stage": 0}, steps=100, warmup_steps=95, lr=1.0, lr_schedule="wsd")
    assert learning_rate(late.stage(1), 95) == 1.0
    assert learning_rate(late.stage(1), 99) == pytest.approx(0.2)


def test_the_warm_up_fits_a_short_training():
    for steps, warmup in ((9, 0), (1000, 100), (10_000, 1000), (100_000, 1000)):
        config = make_config({"stage": 0}, steps=steps, warmup_steps=None)
        assert config.stage(1).warmup_steps == warmup


def test_only_missing_operators_that_are_needed_are_compiled_by_one_process_of_a_machine(
    process_group, monkeypatch
):
    built, told = [], []
    everything = operators.operators()
    names = [operator.name for operator in everything]
    assert names == [operators.CPU_ADAM, operators.COMMUNICATION]
    monkeypatch.setattr(operators, "build", lambda operator, say: built.append(operator.name))

    def start(zero, local_rank, missing=True):
        as_if = [operator._replace(is_built=not missing) for operator in everything]
        monkeypatch.setattr(operators, "operators", lambda: as_if)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        setup = written_setup(make_config(zero).stage(1), 1, on_card=False)
        zero_engine._start_deepspeed(setup, told.append)
        found, built[:] = list(built), []
        return found

    assert start({"stage": 2, **OFFLOAD}, "0") == names
    assert start({"stage": 2}, "0") == [operators.COMMUNICATION]
    assert start({"stage": 2, **OFFLOAD}, "1") == []
    assert start({"stage": 2, **OFFLOAD}, "0", missing=False) == []
    assert told == []
