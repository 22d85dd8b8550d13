"""The planner: predicted against measured bytes, and the choices it makes."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from support.kept import OTHER_JSON
from support.planned import GB, SMALL_CARD, cost_of, plan, recorded, tiny

from imagen_scale.commands.main import main
from imagen_scale.config import load_config
from imagen_scale.errors import ConfigError, EnvironmentProblem, ImagenScaleError
from imagen_scale.planning.activations import measure, step_flops
from imagen_scale.planning.choices import Choices
from imagen_scale.planning.live_bytes import LiveBytes
from imagen_scale.planning.machine import (
    Machine,
    calibration,
    keep_calibration,
    this_machine,
)
from imagen_scale.planning.planner import Planner
from imagen_scale.planning.setup import default_zero, written_setup
from imagen_scale.training import cascade
from imagen_scale.training.choice import choose_setup, keep_setup, smaller

# Live bytes.

# The shipped cascades as their figures are on record.
ON_RECORD = ("training.recipe=null", "unets.1.pred_type=v", "unets.2.pred_type=v")


def test_live_bytes_count_what_is_made_and_still_alive():
    weight = torch.zeros(1000)
    with LiveBytes() as live:
        view = weight[:10]  # made elsewhere
        assert live.now == 0
        a = torch.ones(250)
        b = a.view(25, 10)  # the same storage
        assert live.now == 1000
        del a
        assert live.now == 1000
        c = b + 1
        assert live.now == 2000
        del b, c
        assert (live.now, live.peak) == (0, 2000)
        live.forget_peak()
        assert live.peak == 0
        assert torch.empty(10, device="meta").numel() == view.numel()
        assert live.peak == 0


@pytest.mark.parametrize(
    ("config", "index", "micro_batch", "levels", "precision"),
    [
        ("emoji_demo", 0, 4, ("none",) * 3, "fp32"),
        ("emoji_demo", 0, 3, ("norms",) * 3, "bf16"),
        ("emoji_demo", 1, 2, ("blocks",) * 3, "fp32"),
        ("emoji_demo", 1, 4, ("blocks", "norms", "none"), "fp32"),
        ("pokemon_64", 0, 1, ("norms",) * 3, "fp32"),
        ("pokemon_64", 0, 1, ("blocks", "blocks", "norms"), "fp32"),
    ],
)
def test_activations_are_predicted_within_two_percent(
    config, index, micro_batch, levels, precision
):
    changes = (f"training.precision={precision}", "deepspeed={}")
    checked = load_config(f"configs/{config}.json", changes)
    options = {"micro_batch": micro_batch, "checkpointing": levels}
    predicted = measure(checked.stage(index + 1, 384), **options)
    measured = measure(checked.stage(index + 1, 384), **options, real=True)
    assert predicted.held == pytest.approx(measured.held, rel=0.02)
    assert predicted.peak == pytest.approx(measured.peak, rel=0.02)
    assert predicted[:3] == measured[:3]


def test_networks_larger_than_this_machine_are_measured_without_their_memory():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checked = load_config("configs/imagen_64_256_1024.json")
    found = measure(checked.stage(1, 512), micro_batch=4, checkpointing=("blocks",) * 4)
    assert found.num_parameters > 1.6e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.5e6  # KiB


def test_offload_moves_bytes_from_the_card_to_the_host():
    checked = load_config("configs/emoji_demo.json")
    options = {"micro_batch": 8, "checkpointing": ("blocks",) * 3}
    on_card = measure(checked.stage(1, 384), **options)
    on_host = measure(checked.stage(1, 384), **options, offload_activations=True)
    assert on_card.on_host == 0
    assert 0 < on_card.held - on_host.held <= on_host.on_host


def test_recomputing_costs_flops():
    checked = load_config("configs/emoji_demo.json")
    none, norms, blocks = (
        step_flops(checked.stage(1, 384), checkpointing=(level,) * 3)
        for level in ("none", "norms", "blocks")
    )
    assert none <= norms < 1.1 * none
    assert 1.15 * none < blocks < 1.34 * none  # at most one more forward pass


# Bytes by hand: the arithmetic of the study, P = 1000.


PROCESS = 600_000_000


def test_offload_keeps_two_bytes_a_parameter_on_the_card_and_22_on_the_host():
    cost = cost_of()
    assert (cost.weights, cost.gradients, cost.optimizer, cost.ema) == (2000, 0, 0, 0)
    assert cost.host - PROCESS == 18_000 + 4_000 + 20  # and a buffer of the largest parameter
    assert cost.disk == 4000 + 8000 + 4000 + 4000  # masters, moments, average, and for sampling
    accumulating = cost_of(accumulation=4)
    assert accumulating.host == cost.host
    # Their sum waits in fp32 on the card, and crosses over once a step.
    assert accumulating.gradients == 4000
    assert (cost.transfer, cost.transfer_micro) == (2000, 2000)
    assert (accumulating.transfer, accumulating.transfer_micro) == (2000 + 4000, 0)


def test_optimizers_take_less_host_memory():
    exact = cost_of()
    assert exact.host - cost_of(optimizer="adamw_8bit").host == pytest.approx(5969, abs=2)
    assert exact.host - cost_of(optimizer="adamw_bf16").host == 8000


def test_the_optimizer_inside_backward_takes_twelve_bytes():
    cost = cost_of(in_backward=True, precision="fp32", zero={"stage": 0}, ema_offload=True)
    assert (cost.weights, cost.gradients, cost.optimizer, cost.ema) == (4000, 0, 8000, 0)
    assert cost.host - PROCESS == 4000
    factored = cost_of(in_backward=True, precision="fp32", zero={"stage": 0}, optimizer="adafactor")
    assert factored.optimizer == 4 * 300


def test_two_ranks_share_what_zero_3_shards():
    one = cost_of(zero={"stage": 3, "reduce_bucket_size": 100})
    two = cost_of(zero={"stage": 3, "reduce_bucket_size": 100}, ranks=2)
    for term in ("weights", "gradients", "optimizer", "ema"):
        assert getattr(two, term) * 2 == getattr(one, term)


# Choices.


@pytest.fixture(scope="module")
def paper():
    return load_config("configs/imagen_64_256_1024.json", ON_RECORD)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_stage_of_the_paper_fits_12_gb_and_64_gb(paper, index):
    found = plan(paper, index)
    setup = found.choice.setup
    assert found.fault is None
    assert found.choice.cost.card <= 12 * GB
    assert found.choice.cost.host <= 62 * GB
    assert setup.global_batch == 2048
    assert setup.optimizer == "adamw"
    assert found.choice.activations.num_parameters > 7e8


def test_less_host_memory_is_answered_with_smaller_moments_or_a_fault(paper):
    found = plan(paper, machine=SMALL_CARD._replace(ram=30 * GB))
    assert found.fault is None
    assert found.choice.setup.optimizer in ("adamw_8bit", "adamw_bf16")
    assert found.choice.cost.host <= 30 * GB
    nothing = plan(paper, machine=SMALL_CARD._replace(ram=12 * GB, card=6 * GB))
    assert nothing.fault is not None


@pytest.mark.parametrize("index", [0, 1])
def test_the_cards_cascade_keeps_a_micro_batch_of_four(index):
    config = load_config("configs/cascade_64_256.json", ON_RECORD[:2])
    found = plan(config, index, SMALL_CARD._replace(ram=30 * GB))
    assert found.fault is None
    assert found.choice.setup.global_batch >= 64
    assert found.choice.setup.micro_batch >= 4
    assert found.choice.setup.optimizer == "adamw"


def test_what_the_tests_have_on_record_is_found_today(tmp_path, monkeypatch):
    """Otherwise raise FORMAT of planning/cache.py and write the record anew (support/planned.py).

    Users have such figures on their disks, too.
    """
    monkeypatch.setenv("IMAGEN_SCALE_CACHE", str(tmp_path))
    # The network of the test below, whose figures are on record.
    written = "training.precision=bf16", "training.micro_batch=2", "memory.checkpointing=blocks"
    plan(tiny(*written))
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("plan/*.json")}
    assert found
    assert found == {name: recorded()[name] for name in found}


def test_what_is_written_is_kept():
    config = tiny(
        "training.precision=bf16", "training.micro_batch=2", 'memory.checkpointing="blocks"',
        'deepspeed.zero_optimization={"stage":3}', "training.optimizer=adamw_8bit",
        "memory.ema_offload=true",
    )  # fmt: skip
    setup = plan(config).choice.setup
    assert (setup.micro_batch, setup.accumulation) == (2, 4)
    assert setup.checkpointing == ("blocks", "blocks")
    assert setup.zero == {"stage": 3}
    assert setup.optimizer == "adamw_8bit"
    assert setup.ema_offload


def test_beside_a_compiled_network_nothing_acts_between_layers():
    plain, compiled = (
        Choices(tiny(f"training.compile={value}", "training.grad_clip=null").stage(1), SMALL_CARD)
        for value in ("false", "true")
    )
    assert {mode.zero["stage"] for mode in plain.modes()} >= {0, 2, 3}
    assert {mode.zero["stage"] for mode in compiled.modes()} >= {0, 2}
    assert not any(mode.zero["stage"] == 3 for mode in compiled.modes())
    assert any(mode.in_backward for mode in plain.modes())
    assert not any(mode.in_backward for mode in compiled.modes())
    assert any(offload for _, offload in plain.checkpointings())
    assert not any(offload for _, offload in compiled.checkpointings())


def test_more_memory_never_costs_time_and_is_used():
    config = load_config("configs/pokemon_64.json", ("training.global_batch=64",))
    config = config.model_copy(
        update={
            "deepspeed": {},
            "training": config.training.model_copy(update={"micro_batch": None}),
        }
    )
    seconds, batches = [], []
    for card in (1.5, 3, 6, 12, 24):
        found = plan(config, machine=SMALL_CARD._replace(card=int(card * GB)))
        assert found.fault is None
        seconds.append(found.choice.seconds)
        batches.append(found.choice.setup.micro_batch)
    assert seconds == sorted(seconds, reverse=True)
    # A small card may recompute more and keep its micro-batch; a large one needs neither.
    assert batches[-1] == 64
    assert set(found.choice.setup.checkpointing) == {"none"}
    assert seconds[-1] < seconds[0]


def test_too_little_memory_names_the_term_at_fault(paper):
    card = plan(paper, 2, SMALL_CARD._replace(card=3 * GB))
    assert "the card: " in card.fault
    assert "largest term is activations" in card.fault
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    offloaded = paper.model_copy(update={"deepspeed": {"zero_optimization": zero}})
    host = plan(offloaded, 0, SMALL_CARD._replace(ram=5 * GB))
    assert "host memory: " in host.fault


def test_a_crop_is_never_chosen_but_counted(paper):
    for other in [(found := plan(paper, 2)).choice, *found.others]:
        assert other.activations.peak > 2 * GB  # the whole 1024 px
    unets = [unet.model_copy() for unet in paper.unets]
    unets[2] = unets[2].model_copy(update={"crop": 256})
    cropped = plan(paper.model_copy(update={"unets": tuple(unets)}), 2)
    assert cropped.choice.setup.micro_batch >= 8


def test_attention_over_too_many_pixels_is_said():
    config = tiny("imagen.image_sizes=[16,256]", "unets.1.layer_attns=[true,false]")
    (warning,) = plan(config, 1).warnings
    assert "unets.1.layer_attns.0" in warning
    assert "65536 tokens" in warning
    assert plan(config, 0).warnings == []


def test_a_picture_more_costs_what_every_picture_costs():
    """So two measured batches stand for all."""
    stage = load_config("configs/emoji_demo.json").stage(2, 384)
    peaks = {
        batch: measure(stage, micro_batch=batch, checkpointing=("norms",) * 3).peak
        for batch in (1, 3, 8, 16)
    }
    slope = (peaks[8] - peaks[1]) / 7
    for batch in (3, 16):
        assert peaks[batch] == pytest.approx(peaks[1] + slope * (batch - 1), rel=0.01)


def test_a_run_with_checkpoints_stays_where_its_states_are():
    config = tiny("training.precision=bf16")
    before = plan(config).choice.setup._replace(
        zero={"stage": 2, "offload_optimizer": {"device": "cpu"}}
    )
    found = Planner(config.stage(1, 384), SMALL_CARD).plan(before)
    assert found.choice.setup.zero == before.zero


def test_without_a_card_nothing_is_offloaded():
    found = plan(tiny("training.precision=bf16"), machine=Machine("cpu", None, 20 * GB, 1))
    assert not found.choice.setup.offloads_optimizer


def test_defaults_without_a_budget():
    assert default_zero(1, "fp32", on_card=False) == {"stage": 0}
    assert default_zero(1, "bf16", on_card=True)["stage"] == 2
    assert default_zero(2, "bf16", on_card=True)["stage"] == 3
    setup = written_setup(tiny().stage(1), 1, on_card=False)
    assert setup.checkpointing == ("norms", "norms")
    with pytest.raises(ConfigError, match="8 is not a multiple of 3 processes"):
        written_setup(tiny("training.global_batch=8").stage(1), 3, on_card=False)


# The setup in force.


def test_a_setup_is_chosen_once_and_kept(tmp_path):
    config, told = tiny("memory.budget=2GB"), []
    found = this_machine(1)
    first = choose_setup(config.stage(1), tmp_path, found, told.append)
    assert "planned" in told[-1]
    assert choose_setup(config.stage(1), tmp_path, found, told.append) == first
    assert len(told) == 1
    halved = smaller(first)
    keep_setup(config.stage(1), tmp_path, halved)
    assert choose_setup(config.stage(1), tmp_path, found, told.append) == halved
    other = choose_setup(tiny("training.micro_batch=4").stage(1), tmp_path, found, told.append)
    assert other.micro_batch == 4
    for text in OTHER_JSON:
        (tmp_path / "unet1" / "setup.json").write_text(text)
        assert choose_setup(config.stage(1), tmp_path, found, told.append) == first


@pytest.mark.parametrize(
    "changes",
    [
        ("training.optimizer=adamw_8bit",),
        ("training.precision=bf16",),
        ('deepspeed.zero_optimization={"stage":1}',),
        ("training.grad_clip=1.0",),
    ],
)
def test_what_is_written_counts_for_a_run_with_checkpoints_too(tmp_path, changes):
    written = ("memory.budget=2GB", "training.grad_clip=null", "training.precision=fp32")
    kept = written_setup(tiny(*written).stage(1), 1, on_card=False)._replace(in_backward=True)
    (tmp_path / "unet1" / "step_00000003").mkdir(parents=True)
    keep_setup(tiny(*written).stage(1), tmp_path, kept)
    stage = tiny(*written, *changes).stage(1)
    found = choose_setup(stage, tmp_path, this_machine(1), print)
    fresh = choose_setup(stage, tmp_path / "another", this_machine(1), print)
    assert (found.optimizer, found.precision, found.zero) == (
        fresh.optimizer, fresh.precision, fresh.zero
    )  # fmt: skip
    assert not found.in_backward


def test_a_network_that_is_to_be_compiled_is_planned_anew(tmp_path):
    """It may change between two starts, and excludes some ways."""
    written = ("memory.budget=2GB", "training.grad_clip=null")
    kept = written_setup(tiny(*written).stage(1), 1, on_card=False)._replace(zero={"stage": 3})
    keep_setup(tiny(*written).stage(1), tmp_path, kept)
    assert choose_setup(tiny(*written).stage(1), tmp_path, this_machine(1), print) == kept
    compiled = tiny(*written, "training.compile=true").stage(1)
    assert choose_setup(compiled, tmp_path, this_machine(1), print).zero_stage < 3


def test_bf16_that_auto_took_elsewhere_is_not_emulated(tmp_path):
    stage = tiny("memory.budget=auto", "training.precision=auto").stage(1)
    card = Machine("RTX 3060", 12 * 10**9, 30 * 10**9, 1)
    assert choose_setup(stage, tmp_path, card, print).precision == "bf16"
    old = card._replace(name="Tesla T4", auto_precision="fp16")
    with pytest.raises(EnvironmentProblem, match=r"\(Tesla T4\).*--set training.precision=fp16"):
        choose_setup(stage, tmp_path, old, print)
    fp16 = tiny("memory.budget=auto", "training.precision=fp16").stage(1)
    assert choose_setup(fp16, tmp_path, old, print).precision == "fp16"


@pytest.mark.parametrize(
    ("changes", "call", "told"),
    [
        (("training.global_batch=[3,4]",), {}, "training.global_batch: 4 is not a multiple of 3"),
        (
            ("training.global_batch=[3,8]", "training.micro_batch=[1,4]", "memory.budget=2GB"), {},
            "8 is not a multiple of micro_batch 4 x 3 processes",
        ),
        (("training.global_batch=3",), {"plan_check": 7}, "plan_check 7: U-Net 1 has 6 steps"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_the_first_stage(
    tmp_path, monkeypatch, changes, call, told
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    meeting = SimpleNamespace(watchdog=SimpleNamespace(timeout=None))
    with pytest.raises(ImagenScaleError, match=told):
        cascade.train(tiny(*changes), tmp_path / "run", meeting, **call)
    assert not (tmp_path / "run").exists()


def test_where_things_live_stays_as_it_is_where_it_may(tmp_path):
    written = ("memory.budget=2GB", "training.grad_clip=null", "training.precision=fp32")
    kept = written_setup(tiny(*written).stage(1), 1, on_card=False)._replace(in_backward=True)
    (tmp_path / "unet1" / "step_00000003").mkdir(parents=True)
    keep_setup(tiny(*written).stage(1), tmp_path, kept)
    changed = tiny("memory.budget=3GB", *written[1:], "memory.checkpointing=blocks").stage(1)
    assert choose_setup(changed, tmp_path, this_machine(1), print).in_backward
    # Gradients of several processes have to be exchanged first.
    assert not choose_setup(changed, tmp_path, this_machine(2), print).in_backward


def test_the_optimizer_in_backward_is_for_one_process():
    stage = tiny("memory.optimizer_in_backward=true", "training.grad_clip=null").stage(1)
    said = r"optimizer_in_backward: true for U-Net 1, but 2 processes"
    with pytest.raises(ConfigError, match=said):
        written_setup(stage, 2, on_card=False)
    with pytest.raises(ConfigError, match=said):
        Planner(stage, SMALL_CARD._replace(ranks=2))
    assert written_setup(stage, 1, on_card=False).in_backward


def test_a_budget_that_nothing_fits_is_refused_with_the_nearest(tmp_path):
    config = tiny("memory.budget=1MB")
    with pytest.raises(EnvironmentProblem, match=r"budget 1MB: U-Net 1 does not fit.*at fault"):
        choose_setup(config.stage(1), tmp_path, this_machine(1), print)


def test_smaller_keeps_the_global_batch():
    setup = written_setup(tiny("training.global_batch=12").stage(1), 1, on_card=False)
    batches = []
    while setup is not None:
        assert setup.global_batch == 12
        batches.append(setup.micro_batch)
        setup = smaller(setup)
    assert batches == [12, 6, 3, 1]
    in_backward = written_setup(tiny().stage(1), 1, on_card=False)._replace(in_backward=True)
    assert smaller(in_backward) is None


def test_calibration_is_kept_by_name_and_survives_damage(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEN_SCALE_CACHE", str(tmp_path))
    assert calibration("RTX 4070") == 1
    keep_calibration("RTX 4070", 1.07)
    keep_calibration("RTX 3060", 0.97)
    assert (calibration("RTX 4070"), calibration("RTX 3060")) == (1.07, 0.97)
    for text in OTHER_JSON:
        (tmp_path / "plan" / "calibration.json").write_text(text)
        assert calibration("RTX 4070") == 1
        keep_calibration("RTX 4070", 1.07)
        assert calibration("RTX 4070") == 1.07


# The command.


def run(*arguments):
    return CliRunner().invoke(main, ["plan", *arguments])


def test_plan_prints_every_term_and_the_reason(tiny_config):
    done = run("--config", str(tiny_config), "--memory", "4GB", "--ram", "16GB", "--explain")
    assert done.exit_code == 0, done.output
    for word in (
        "weights", "gradients", "optimizer", "ema", "activations", "buckets", "workspace",
        "total on the card", "host memory", "pinned", "disk per checkpoint", "relative step cost",
        "why: ", "not taken: ", "16 px", "32 px",
    ):  # fmt: skip
        assert word in done.output


def test_without_a_card_the_tensors_count_as_host_memory(tiny_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = "--config", str(tiny_config), "--unet", "1", "--gpus", "2"
    done = run(*arguments, "--json")
    assert "there is no card: training plans nothing here" in done.stderr
    (plan,) = json.loads(done.stdout)
    rows = dict(re.findall(r"^│ ([a-z ]+?) +│ +([\d.]+) │$", run(*arguments).output, re.M))
    card, host = plan["bytes"]["card"], plan["bytes"]["host"]
    assert float(rows["total of a process"]) == round(card / 1e9, 2)
    assert float(rows["host memory"]) == pytest.approx((2 * card + host) / 1e9, abs=0.006)
    assert plan["bytes"]["host_of_a_machine"] == 2 * card + host
    assert "ZeRO-0" in run(*arguments).output


@pytest.mark.parametrize("command", [[], ["plan"], ["sample"], ["upscale"]])
def test_examples_in_help_keep_their_lines(command):
    done = CliRunner().invoke(main, [*command, "--help"])
    assert "\\b" not in done.output
    assert "\n      imagen-scale " in done.output


def test_plan_writes_json_and_deepspeeds_settings(tiny_config, tmp_path):
    done = run(
        "--config", str(tiny_config), "--memory", "4GB", "--ram", "16GB", "--json",
        "--write", str(tmp_path / "out"), "--set", "training.precision=bf16",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    plans = json.loads(done.stdout)
    assert [entry["unet"] for entry in plans] == [1, 2]
    for entry in plans:
        assert entry["fits"]
        settings = json.loads(
            (tmp_path / "out" / f"unet{entry['unet']}_deepspeed.json").read_text()
        )
        assert settings["train_batch_size"] == entry["global_batch"] == 8
        assert settings["zero_optimization"]["stage"] == entry["setup"]["zero"]["stage"]
        assert settings["bf16"]["enabled"]


def test_plan_exits_with_1_when_nothing_fits_and_2_for_wrong_use(tiny_config):
    done = run("--config", str(tiny_config), "--memory", "4GB", "--ram", "1GB")
    assert done.exit_code == 2 and "--ram 1GB: 2 GB of it are the rest of" in done.output
    done = run("--config", str(tiny_config), "--memory", "10MB", "--ram", "16GB")
    assert done.exit_code == 1
    assert "At fault" in done.output
    wrong = run("--config", str(tiny_config), "--memory", "lots")
    assert wrong.exit_code == 2
    assert "--memory: 'lots' is not a size" in wrong.output
    assert run("--config", str(tiny_config), "--unet", "3").exit_code == 2
