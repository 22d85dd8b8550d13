"""Averages of the weights whose length is chosen after training."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.tiny import write_run

from imagen_scale.commands.main import main
from imagen_scale.diffusion import ema_profiles
from imagen_scale.diffusion.ema_profiles import Profile, gamma_of, mixture, weights_of_steps
from imagen_scale.errors import CheckpointError, UsageError
from imagen_scale.runs import averages
from imagen_scale.runs.folders import (
    best_path,
    best_record_path,
    inference_path,
    snapshot_path,
    trained_path,
)
from imagen_scale.runs.inference import read_inference, save_inference
from imagen_scale.training.best import keep_if_best
from imagen_scale.training.ema import PowerEma

STEPS = 64
KEPT = (0.05, 0.1)
GROWTH = 1e-3  # of every weight in a step


def test_the_exponents_are_those_of_the_paper():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)  # section 3.1
    assert gamma_of(0.1) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(ema_profiles.WIDEST) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("width", [0.03, 0.1, 0.25])
def test_what_the_steps_weigh_is_what_the_decays_multiply_to(width):
    weights = torch.zeros(500, dtype=torch.float64)
    for step in range(1, 401):
        weights *= ema_profiles.decay(step, width)
        weights[step - 1] += 1 - ema_profiles.decay(step, width)
    found = weights_of_steps(Profile(400, width), 500)
    torch.testing.assert_close(found, weights, rtol=0, atol=1e-14)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    # The width is the standard deviation of what is remembered, in shares of the training.
    at = torch.arange(1, 501, dtype=torch.float64)
    mean = (at * found).sum()
    deviation = ((at - mean).square() * found).sum().sqrt()
    assert deviation / 400 == pytest.approx(width, rel=0.01)


def test_saved_averages_make_up_others():
    saved = [Profile(step, width) for step in range(20, 321, 20) for width in KEPT]
    for width in KEPT:
        exact = mixture(saved, Profile(320, width))
        assert exact.error < 1e-9
        assert exact.coefficients.abs().max() == pytest.approx(1, abs=1e-6)
    for width, error in ((0.03, 0.05), (0.07, 0.006), (0.15, 0.02), (0.2, 0.05)):
        assert mixture(saved, Profile(320, width)).error < error
    assert mixture(saved, Profile(320, 0.01)).error > averages.WORST


def trained(widths, saved_every):
    """Averages of a walk of eight weights, and their snapshots by step and width."""
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(8, generator=generator)
    engine = SimpleNamespace(masters=lambda: [master])
    kept, snapshots = [PowerEma(engine, width) for width in widths], {}
    for step in range(1, STEPS + 1):
        master += 0.1 * torch.randn(8, generator=generator)
        for ema in kept:
            ema.update(step)
            if step % saved_every == 0:
                snapshots[step, ema.width] = ema.shards[0].clone()
    return kept, snapshots


def test_an_average_that_was_not_kept_is_what_it_would_have_been():
    (wanted, *_), _ = trained([0.07], STEPS)
    for saved_every, apart in ((1, 1e-6), (4, 3e-3)):
        _, snapshots = trained(KEPT, saved_every)
        made = mixture([Profile(*key) for key in snapshots], Profile(STEPS, 0.07))
        weights = sum(c * s for c, s in zip(made.coefficients, snapshots.values(), strict=True))
        torch.testing.assert_close(weights.float(), wanted.shards[0], rtol=0, atol=apart)


def growth(profile):
    """By how much an average has grown."""
    steps = torch.arange(1, STEPS + 1, dtype=torch.float64)
    return GROWTH * (steps * weights_of_steps(profile, STEPS)).sum().item()


@pytest.fixture
def run(tmp_path):
    """A run whose first stage left averages: weights that grow with every step."""
    run = tmp_path / "run"
    write_run(run, overrides=("imagen.timesteps=21",))
    file = read_inference(inference_path(run, 1))
    file = file._replace(step=STEPS, steps=STEPS)
    weights = load_file(file.path)
    save_inference(file, weights)
    for step in range(4, STEPS + 1, 4):
        for width in KEPT:
            grown = growth(Profile(step, width))
            path = snapshot_path(run, 1, step, width)
            some = {name: value + grown for name, value in weights.items()}
            save_inference(file._replace(path=path, step=step), some)
    return run


def test_sampling_takes_the_average_asked_for_and_the_trained_one_again(run):
    before = load_file(inference_path(run, 1))
    averages.install(run, 1, 0.07)
    file = read_inference(inference_path(run, 1))
    assert file.average == "power function of width 0.07" and file.is_finished
    grown = growth(Profile(STEPS, 0.07))
    for name, value in load_file(file.path).items():
        torch.testing.assert_close(value, before[name] + grown, rtol=0, atol=2e-5)
    averages.install(run, 1, 0.1)  # another: the trained one is kept all the same
    assert averages.restore(run, 1)
    assert not averages.restore(run, 1)
    after = load_file(inference_path(run, 1))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not trained_path(run, 1).exists()


def test_what_cannot_be_made_is_refused_and_changes_nothing(run):
    before = inference_path(run, 1).read_bytes()
    with pytest.raises(UsageError, match="misses it by"):
        averages.install(run, 1, 0.01)
    with pytest.raises(UsageError, match="U-Net 2 has no saved averages"):
        averages.install(run, 2, 0.05)
    assert inference_path(run, 1).read_bytes() == before
    assert not list(run.rglob("made*"))


def cut(path, weights):
    path.write_bytes(path.read_bytes()[:-1000])


def of_fewer(path, weights):
    del weights["final_conv.bias"]
    save_file(weights, path)


def of_another_shape(path, weights):
    weights["final_conv.bias"] = weights["final_conv.bias"].sum(0, keepdim=True)  # it would spread
    save_file(weights, path)


@pytest.mark.parametrize("damage", [cut, of_fewer, of_another_shape])
def test_a_damaged_snapshot_is_named_and_changes_nothing(run, damage):
    before = inference_path(run, 1).read_bytes()
    path = snapshot_path(run, 1, 32, 0.1)
    damage(path, load_file(path))
    with pytest.raises(CheckpointError, match=f"{path}: damaged, or of another network .* Delete"):
        averages.install(run, 1, 0.07)
    assert inference_path(run, 1).read_bytes() == before
    assert not list(run.rglob("made*"))
    path.unlink()  # as it says
    averages.install(run, 1, 0.07)


def test_what_is_not_called_like_a_snapshot_is_none(run):
    found = averages.find_snapshots(run, 1)
    (found.files[0].parent / "step_4_width_..safetensors").touch()
    assert averages.find_snapshots(run, 1) == found


def test_a_width_is_kept_as_it_was_written(tmp_path):
    for width in (0.05, 0.0055, 0.0105):
        path = snapshot_path(tmp_path, 1, 8, width)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    path.with_name("step_00000008_width_0.100.safetensors").touch()  # an older version's
    found = [one.width for one in averages.list_snapshots(tmp_path, 1)]
    assert sorted(found) == [0.0055, 0.0105, 0.05, 0.1]


def test_what_training_left_and_is_gone_is_said(run):
    averages.install(run, 1, 0.1)
    trained_path(run, 1).unlink()
    before = inference_path(run, 1).read_bytes()
    done = CliRunner().invoke(main, ["ema", str(run), "--restore"])
    assert done.exit_code == 1
    assert f"{trained_path(run, 1)}: not found: what training left is not here" in done.output
    assert inference_path(run, 1).read_bytes() == before


@pytest.mark.parametrize("picked", [None, 0.1])
def test_json_is_all_that_is_printed(run, monkeypatch, picked):
    def best(found):
        return next(one for one in found if one.width == picked)

    monkeypatch.setattr("imagen_scale.evaluation.averages.best", best)
    done = CliRunner().invoke(main, ["ema", str(run), "--num", "2", "--pick", "--json"])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)) == 9
    assert ("of width 0.1; --restore" if picked else "own average is the best") in done.stderr
    assert bool(read_inference(inference_path(run, 1)).average) == bool(picked)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num", "3", "--width", "0.1"), "--num: goes with measuring, alone or with --pick"),
        (("--json", "--best"), "--json: goes with measuring"),
        (("--cond-scale", "2", "--restore"), "--cond-scale: goes with measuring"),  # the default
        (("--cond-scale", "2"), "--cond-scale: is of drawing pictures, for KID; give --features"),
        (("--steps", "7", "--pick"), "--steps: is of drawing pictures, for KID; give --features"),
        (("--width", "nan"), "'nan' is not a finite number"),
        (("--cond-scale", "inf"), "'inf' is not a finite number"),
        (("--width", "0.3"), "0.3 is not in the range"),
        (("--unet", "9"), "unet 9: this cascade has U-Nets 1 to 2"),
    ],
)
def test_wrong_use_is_one_sentence(run, words, message):
    before = inference_path(run, 1).read_bytes()
    done = CliRunner().invoke(main, ["ema", str(run), *words])
    assert done.exit_code == 2 and message in done.output, done.output
    assert inference_path(run, 1).read_bytes() == before


def test_the_command_measures_and_picks(run):
    def told(*words):
        done = CliRunner().invoke(main, ["ema", str(run), *words])
        assert done.exit_code == 0, done.output
        return done.stdout

    found = json.loads(told("--num", "3", "--json"))
    assert [one["width"] for one in found] == [None, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25]
    assert all(math.isfinite(one["x_0_error"]) and one["kid"] is None for one in found)
    assert read_inference(inference_path(run, 1)).average == ""  # nothing is changed
    # The other averages are noise beside weights that were trained little.
    assert min(found, key=lambda one: one["x_0_error"])["width"] is None
    words = ("--num", "2", "--json", "--cond-scale", "1", "--features", "efficientnet-lite0")
    drawn = json.loads(told(*words))
    assert all(math.isfinite(one["kid"]) for one in drawn)  # in 21 steps: there are no 25 times
    assert "training's own average is the best" in told("--num", "3", "--pick")
    assert "samples from the average of width 0.1" in told("--width", "0.1")
    assert "samples from training's own average" in told("--restore")
    done = CliRunner().invoke(main, ["ema", str(run), "--pick", "--restore"])
    assert done.exit_code == 2 and "give one of them" in done.output


def test_few_steps_are_picked_by_kid_alone(tmp_path):
    """Of the noise levels between its own a student learned nothing."""
    run = tmp_path / "run"
    write_run(run, overrides=(
        'distill={"teacher": "t", "steps": [2, null], "cond_scale": 2}', "unets.0.pred_type=v",
        "training.loss_weight=v_clipped",
    ))  # fmt: skip
    file = read_inference(inference_path(run, 1))
    weights = load_file(file.path)
    for step in (2, 4, 6):
        save_inference(file._replace(path=snapshot_path(run, 1, step, 0.1), step=step), weights)

    def told(*words, code=0):
        done = CliRunner().invoke(main, ["ema", str(run), "--num", "2", *words])
        assert done.exit_code == code, done.output
        return done.output

    assert "--features: U-Net 1 takes 2 steps, of which the error" in told(code=2)
    assert "leave --cond-scale out" in told(
        "--features", "efficientnet-lite0", "--cond-scale", "3", code=2
    )
    table = told("--features", "efficientnet-lite0")
    assert "KID x 1000" in table and "error of the predicted" not in table


def test_the_best_validation_is_sampled_from_and_the_trained_one_again(run):
    def told(*words, code=0):
        done = CliRunner().invoke(main, ["ema", str(run), *words])
        assert done.exit_code == code, done.output
        return done.output

    assert "of U-Net 1 no best validation was kept. Train with" in told("--best", code=2)
    file = read_inference(inference_path(run, 1))
    before = load_file(file.path)
    best = {name: value + 1 for name, value in before.items()}
    save_inference(file._replace(path=best_path(run, 1), step=8), best)
    for text in (
        "{", "[]", "{}", '{"measure": "val_loss", "value": [], "step": 8}',
        '{"measure": "val_loss", "value": 0.25, "step": 1e400}',
    ):  # fmt: skip
        best_record_path(run, 1).write_text(text)
        assert "best.json: is damaged. Delete it" in told("--best", code=1)
    record = {"measure": "val_loss", "value": 0.25, "step": 8}
    best_record_path(run, 1).write_text(json.dumps(record))
    assert "of step 8, where val_loss was least (0.25); --restore undoes it" in told("--best")
    file = read_inference(inference_path(run, 1))
    assert file.is_finished and file.average == "step 8, where val_loss was least"
    assert all(torch.equal(value, best[name]) for name, value in load_file(file.path).items())
    told("--restore")
    after = load_file(inference_path(run, 1))
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_is_best_is_kept_across_validations_and_training_again(tmp_path, process_group):
    """Also where it goes on from before: what was measured then comes again."""
    saved = []

    def save_average(ema, path, step, what):
        saved.append(step)
        return step != 5  # the disk is full at step 5

    said = []
    saver = SimpleNamespace(
        run_dir=tmp_path, save_average=save_average, pictures="a", say=said.append
    )
    training = SimpleNamespace(keep_best="val_loss")
    stage = SimpleNamespace(number=1, training=training)
    best_record_path(tmp_path, 1).parent.mkdir(parents=True)
    losses = [(1, 0.5), (2, 0.7), (3, math.nan), (4, 0.4), (3, 0.6), (4, 0.4), (5, 0.3), (6, 0.35)]
    for step, loss in losses:
        session = SimpleNamespace(stage=stage, step=step, ema=None)
        keep_if_best(session, saver, {"val_loss": loss}, 16)
    assert saved == [1, 4, 5, 6] and said == []
    record = best_record_path(tmp_path, 1)
    best = {"measure": "val_loss", "value": 0.35, "step": 6}
    assert json.loads(record.read_text()) == best | {"samples": 16, "pictures": "a"}

    def at(step, samples, **measures):
        session = SimpleNamespace(stage=stage, step=step, ema=None)
        keep_if_best(session, saver, measures, samples)
        return saved[-1] == step, said[-1] if said else None

    # What was measured on other samples or by another measure does not compare.
    kept, why = at(7, 8, val_loss=0.9)
    assert kept and "of step 6, does not compare (samples 16, now 8)" in why
    saver.pictures = "b"
    assert at(8, 8, val_loss=1.5) == (True, why.replace("6", "7").replace("samples 17, now 8",
              "other pictures").replace("step 7 on", "step 8 on"))  # fmt: skip
    training.keep_best = "val_x_0_error"
    kept, why = at(9, 8, val_x_0_error=9.0)
    assert kept and "(measure val_loss, now val_x_0_error)" in why
    assert at(10, 8, val_x_0_error=9.5) == (False, why)
    record.write_text("[]")  # damaged from outside: kept anew
    assert at(11, 8, val_x_0_error=9.5) == (True, why)
    record.write_text(json.dumps({"measure": "val_x_0_error", "value": 9.0, "step": 6}))
    assert at(12, 8, val_x_0_error=9.5) == (False, why)  # an older version's


KILLED = """
import os, runpy, sys
from imagen_scale.training.saving import Saver
save = Saver.save
def save_and_die(self, session):
    save(self, session)
    os._exit(9)
Saver.save = save_and_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.distributed
def test_none_is_lost_to_a_kill_behind_the_last_checkpoint(tiny_config, launch, tmp_path):
    script, run = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(KILLED)
    options = (
        "training.ema_widths=[0.1]", "training.ema_snapshot_every=3", "data.val_fraction=0.3",
        "training.keep_best=val_loss", "training.val_every=6", "training.checkpoint_every=6",
        "training.sample_every=null", "--unet", "1",
    )  # fmt: skip
    killed = launch(tiny_config, run, *options, plain=True, script=script, check=False)
    assert killed.returncode == 9, killed.stderr
    done = launch(tiny_config, run, *options, plain=True)
    assert "its checkpoint is of step 6" in done.stdout
    assert best_path(run, 1).is_file() and best_record_path(run, 1).is_file()
    for step in (3, 6):
        assert read_inference(snapshot_path(run, 1, step, 0.1)).step == step
    assert read_inference(inference_path(run, 1)).is_finished
