"""What a training takes in hours and leaves on disk."""

import json
import re

import pytest
from click.testing import CliRunner
from support.planned import GB, SMALL_CARD, plan, tiny

from imagen_scale.commands.main import main
from imagen_scale.config import load_config
from imagen_scale.planning.hours import CARDS, SHARE, cards_for, disk_left, hours
from imagen_scale.planning.machine import Machine
from imagen_scale.planning.planner import Planner

UNNAMED = Machine("cpu", 12 * GB, 30 * GB, 1)


def names(machine):
    return [card.name for card in cards_for(machine)]


@pytest.mark.parametrize(
    ("gigabytes", "found"),
    [
        (12, ["RTX 3060", "RTX 4070", "RTX 5070"]),
        (6, ["RTX 3060", "RTX 4070", "RTX 5070"]),
        (12.9, ["RTX 3060", "RTX 4070", "RTX 5070"]),  # 12 GiB
        (24, ["L4", "A10", "RTX 3090", "RTX 4090"]),
        (200, ["A100", "H100"]),
    ],
)
def test_hours_are_told_for_cards_of_the_memory_that_is_planned_for(gigabytes, found):
    assert names(UNNAMED._replace(card=int(gigabytes * GB))) == found


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA GeForce RTX 3060", ["RTX 3060"]),
        ("NVIDIA GeForce RTX 4070 Ti", []),
        ("NVIDIA GeForce RTX 4080 SUPER", []),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", []),
        ("Tesla T4", ["T4"]),
        ("NVIDIA A10G", []),
        ("NVIDIA A100-SXM4-80GB", ["A100"]),
        ("NVIDIA H100 80GB HBM3", ["H100"]),
    ],
)
def test_of_a_card_at_hand_by_its_name(name, found):
    assert names(UNNAMED._replace(name=name)) == found


def test_without_a_card_no_hours_are_told():
    assert names(Machine("cpu", None, 30 * GB, 1)) == []


def test_hours_are_steps_times_seconds_and_shrink_with_the_card():
    config = tiny()
    stage, candidate = config.stage(1, 384), plan(config).choice
    first, *others = (hours(candidate, stage, card, SMALL_CARD) for card in CARDS)
    assert first == pytest.approx(stage.steps * candidate.seconds / 3600)
    assert all(one < first for one in others)
    # What neither computes nor moves the card's memory stays: launching kernels.
    endless = CARDS[0]._replace(flops=1e30, bytes_per_s=1e30)
    left = hours(candidate, stage, endless, SMALL_CARD)
    transfers = (candidate.cost.transfer_micro + candidate.cost.transfer) / 12e9
    assert left == pytest.approx(stage.steps * (0.05 + transfers) / 3600)
    assert pytest.approx(0.52) == SHARE


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ([], 2),
        (["training.keep_checkpoints=3"], 3),
        (["training.steps=60", "training.checkpoint_every=10", "training.keep_every=20"], 2 + 3),
        (["training.steps=60", "training.checkpoint_every=10", "training.keep_every=15"], 2 + 2),
    ],
)
@pytest.mark.parametrize("widths", [(), (0.05, 0.1)])
def test_disk_is_checkpoints_that_are_kept_averages_and_the_file_for_sampling(
    changes, kept, widths
):
    averages = (f"training.ema_widths={list(widths)}", "training.ema_snapshot_every=4")
    config = tiny(*changes, *averages)
    steps = range(1, config.stage(1, 384).steps + 1)
    snapshots = len(widths) * sum(step % 4 == 0 or step == steps[-1] for step in steps)
    candidate = plan(config).choice
    parameters = candidate.activations.num_parameters
    one = candidate.cost.disk - 4 * parameters
    found = disk_left(candidate.cost, parameters, config.stage(1, 384))
    assert found == kept * one + (1 + snapshots) * 4 * parameters


def test_both_stages_of_the_pokemon_cascade_train_within_two_days_on_12_gb():
    config = load_config("configs/pokemon_64_256.json")
    taken = []
    for stage in config.stages():
        found = Planner(stage, UNNAMED).plan()
        assert found.fault is None
        taken.append(hours(found.choice, stage, CARDS[0], UNNAMED))
    assert sum(taken) < 48


def test_plan_prints_hours_and_disk_and_calls_them_predicted(tmp_path):
    config = tmp_path / "tiny.json"
    config.write_text(tiny().model_dump_json())
    arguments = ["plan", "--config", str(config), "--memory", "12GB", "--ram", "32GB"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    rows = dict(re.findall(r"^│ ([^│]+?) +│ +([\d.]+) │", done.output, re.M))
    assert "hours on RTX 3060, predicted" in rows and "disk when trained" in rows
    assert "52% of the card's stated rate: an assumption, not measured" in done.output
    first, _ = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert list(first["predicted_hours"]) == ["RTX 3060", "RTX 4070", "RTX 5070"]
    assert first["bytes"]["disk_left"] / 1e9 == pytest.approx(
        float(rows["disk when trained"]), abs=0.006
    )
