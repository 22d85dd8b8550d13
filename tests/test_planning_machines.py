"""What is planned for several cards and machines, old cards, and what nobody has to wait for."""

import pytest
import torch
from support import ROOT
from support.planned import GB, SMALL_CARD, cost_of, plan, tiny

from imagen_scale.config import load_config
from imagen_scale.errors import EnvironmentProblem
from imagen_scale.planning import cache
from imagen_scale.planning.activations import measure
from imagen_scale.planning.cache import cached_measure
from imagen_scale.planning.cost import CARD_PROCESS
from imagen_scale.planning.machine import CONTEXT_BYTES, joined, this_machine
from imagen_scale.planning.setup import written_setup
from imagen_scale.training.choice import check_precision, smaller

EIGHT_BY_EIGHT = SMALL_CARD._replace(ranks=64, local_ranks=8, ram=126 * GB)


@pytest.mark.parametrize("name", ["cascade_64_256", "imagen_64_256_1024"])
def test_shipped_configurations_fit_eight_machines_of_eight_small_cards(name):
    config = load_config(f"configs/{name}.json")
    for index in range(len(config.unets)):
        found = plan(config, index, EIGHT_BY_EIGHT)
        assert found.fault is None
        assert found.choice.setup.ranks == 64
        # What one machine holds, not what all hold together.
        assert EIGHT_BY_EIGHT.share(found.choice.cost.host) <= 126 * GB
    one_machine = plan(config, 0, EIGHT_BY_EIGHT._replace(local_ranks=64))
    assert one_machine.fault is not None and "host memory" in one_machine.fault


def test_host_memory_is_that_of_each_machine():
    config = load_config("configs/cascade_64_256.json")
    eight_on_two = SMALL_CARD._replace(ranks=8, local_ranks=4, ram=16 * GB)
    assert plan(config, 0, eight_on_two).fault is None
    assert eight_on_two.share(20 * GB) == 10 * GB
    assert SMALL_CARD._replace(ranks=12, local_ranks=8).share(12) == 8  # the fuller of 8 and 4


def test_ranks_count_on_the_least_that_any_of_them_has():
    def sees(host, **facts):
        return host, SMALL_CARD._replace(ranks=4, **facts)

    found = joined(
        [
            sees("a", card=12 * GB), sees("a", card=11 * GB, link=9e9),
            sees("a", ram=60 * GB), sees("b", ram=30 * GB, auto_precision="fp16", link=2e9),
        ]
    )  # fmt: skip
    assert found == SMALL_CARD._replace(
        ranks=4, local_ranks=3, card=11 * GB, ram=30 * GB, auto_precision="fp16", link=2e9
    )
    assert joined([sees("a"), ("b", SMALL_CARD._replace(ranks=4, card=None))]).card is None


def test_the_context_that_exists_when_memory_is_asked_for_is_not_counted_twice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (11 * GB, 12 * GB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    here = this_machine(1)
    assert here.card == 11 * GB + CONTEXT_BYTES
    assert 0 < CONTEXT_BYTES < CARD_PROCESS
    assert here.auto_precision == "fp16"


def test_zero_1_is_a_way_for_several_ranks_and_slow_links_want_fewer_exchanges():
    config = tiny("training.precision=fp32", "training.micro_batch=1", "training.global_batch=64")
    two = SMALL_CARD._replace(ranks=2)
    found = plan(config, 0, two)
    stages = {candidate.setup.zero_stage for candidate in [found.choice, *found.others]}
    assert stages >= {0, 1, 2, 3}
    slow = plan(config, 0, two._replace(link=1e5)).choice
    assert slow.setup.zero_stage in (0, 1)  # gradients once a step
    assert slow.seconds > found.choice.seconds


def test_what_ranks_send_is_what_zero_says():
    two = {"ranks": 2, "accumulation": 4}

    def sent(stage):
        cost = cost_of(zero={"stage": stage}, precision="fp32", **two)
        return cost.exchange + 4 * cost.exchange_micro

    half = 4 * 1000 // 2
    assert [sent(stage) for stage in range(4)] == [2 * half, 2 * half, 5 * half, 12 * half]
    assert cost_of().exchange == 0


def test_nothing_has_to_be_measured_to_plan_what_is_shipped(monkeypatch, tmp_path):
    monkeypatch.setenv("IMAGEN_SCALE_CACHE", str(tmp_path))
    for function in ("measure", "step_flops"):
        monkeypatch.setattr(cache, function, None)  # calling it would fail
    for path in sorted(ROOT.glob("configs/*.json")):
        config = load_config(path)
        for index in range(len(config.unets)):
            for card in (8, 12, 24, 80):
                plan(config, index, SMALL_CARD._replace(card=card * GB, ram=500 * GB))


def test_what_is_shipped_is_what_is_found_today(monkeypatch, tmp_path):
    """Otherwise raise FORMAT of planning/cache.py and run benchmarks/plan_figures.py."""
    monkeypatch.setenv("IMAGEN_SCALE_CACHE", str(tmp_path))
    stage = load_config("configs/emoji_demo.json").stage(1)
    options = {
        "micro_batch": 1, "checkpointing": ("norms",) * stage.unet.num_levels,
        "offload_activations": False,
    }  # fmt: skip
    shipped = cached_measure(stage, precision="bf16", **options)
    assert not list(tmp_path.rglob("*.json"))
    assert shipped == measure(stage, precision="bf16", **options)


# Precision, and what gradients are added up in.


def test_auto_is_what_the_card_was_made_for():
    auto = tiny('training.precision="auto"')
    for precision in ("bf16", "fp16", "fp32"):
        found = plan(auto, machine=SMALL_CARD._replace(auto_precision=precision))
        assert found.choice.setup.precision == precision
    setup = written_setup(auto.stage(1), 1, on_card=True, auto_precision="fp16")
    assert (setup.precision, setup.zero_stage) == ("fp16", 2)
    assert written_setup(auto.stage(1), 1, on_card=False).precision == "fp32"


def test_fp16_takes_what_bf16_takes_and_no_bf16_moments():
    half = plan(tiny("training.precision=fp16")).choice
    assert half.cost == plan(tiny("training.precision=bf16")).choice.cost
    assert {c.setup.optimizer for c in plan(tiny("training.precision=fp16")).others} <= {
        "adamw", "adamw_8bit",
    }  # fmt: skip


def test_bf16_on_a_card_that_emulates_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "RTX 2060")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(EnvironmentProblem, match=r"bf16, but RTX 2060 .*training.precision=auto"):
        check_precision(tiny("training.precision=bf16"))
    check_precision(tiny("training.precision=auto"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    check_precision(tiny("training.precision=bf16"))


def test_stage_1_becomes_stage_2_where_16_bits_are_accumulated():
    written = "training.precision=bf16", 'deepspeed.zero_optimization={"stage":1}'
    one = written_setup(tiny(*written).stage(1), 1, on_card=True)
    two = written_setup(tiny(*written, "training.micro_batch=4").stage(1), 1, on_card=True)
    assert (one.accumulation, one.zero_stage, one.sums_in_fp32) == (1, 1, False)
    assert (two.accumulation, two.zero_stage, two.sums_in_fp32) == (2, 2, True)
    assert smaller(one).zero_stage == 2  # also after memory ran out
    exact = tiny("training.precision=fp32", written[1], "training.micro_batch=4")
    assert written_setup(exact.stage(1), 1, on_card=True).zero_stage == 1
