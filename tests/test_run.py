"""What may be trained into an existing run's folder."""

import json
import os

import pytest
from support.tiny import TINY, write_run

from imagen_scale.config import parse_config
from imagen_scale.data.sources.opening import open_source
from imagen_scale.errors import ConfigError, DataError, UsageError
from imagen_scale.files.atomic import temporary_path
from imagen_scale.runs.folders import owner_path
from imagen_scale.training.may_continue import (
    check_run,
    check_split,
    check_text_width,
    keep_warmup,
    open_run,
    unet_numbers,
)
from imagen_scale.training.rates import learning_rate


def config(*overrides):
    return parse_config(json.dumps(TINY), overrides=overrides)


@pytest.fixture
def run(tmp_path):
    open_run(config(), tmp_path / "run", fresh=[])
    return tmp_path / "run"


def check(run, *overrides, **flags):
    told = []
    check_run(config(*overrides), run, told.append, **{"resume": False, "fresh": []} | flags)
    return told


def test_the_same_configuration_continues(run):
    assert check(run, resume=True) == []


@pytest.mark.parametrize(
    "change",
    ["unets.1.dim=16", "imagen.timesteps=200", "training.seed=1", "training.global_batch=16",
     "data.flip=true", "imagen.image_sizes=[16,64]"],
)  # fmt: skip
def test_what_makes_it_another_run_is_refused_by_name(run, change):
    key, _, value = change.partition("=")
    with pytest.raises(ConfigError, match=key.replace(".", r"\.") + ".* -> ") as caught:
        check(run, change)
    assert value.strip("[]").split(",")[0].capitalize() in str(caught.value).title()
    assert check(run, change, fresh=[1, 2]) == []


def test_another_spelling_of_a_folder_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def places(data, first):
        start = json.dumps([str(first), None])
        return f'data={{"source":"folder","path":"{data}"}}', f"training.start_from={start}"

    open_run(config(*places("pictures", "a")), tmp_path / "run", fresh=[])
    assert check(tmp_path / "run", *places("./pictures/", "~/a")) == []
    assert check(tmp_path / "run", *places(tmp_path / "pictures", tmp_path / "a")) == []
    for other in (places("others", "a"), places("pictures", "b")):
        with pytest.raises(ConfigError, match=r"(data\.path|training\.start_from): .* -> "):
            check(tmp_path / "run", *other)


def test_one_stage_anew_does_not_change_what_the_other_was_begun_with(run):
    begun = run / "unet2" / "step_00000003"
    begun.mkdir(parents=True)
    assert check(run, "unets.0.dim=16", fresh=[1]) == []  # that one's own
    for change in ("training.seed=1", "imagen.image_sizes=[8,32]", "unets.1.dim=16"):
        with pytest.raises(ConfigError, match=r"U-Net 2, half-trained there, could not go on"):
            check(run, change, fresh=[1])
        assert check(run, change, fresh=[1, 2]) == []
    begun.rmdir()
    assert check(run, "training.seed=1", fresh=[1]) == []


def test_a_finished_stage_stands_for_itself(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "unet2" / "step_00000006").mkdir()
    assert check(tmp_path / "run", "training.seed=1", fresh=[1]) == []


def test_what_bends_the_curve_is_told(run):
    assert check(run, "training.steps=60") == [
        "changed since this run was started: training.steps: 6 -> 60"
    ]


def test_a_training_that_is_made_longer_keeps_the_warmup_it_began_with(tmp_path):
    """Null is a tenth of the steps; the rate would fall back, and rise for hundreds of them."""
    run, long = tmp_path / "run", "training.steps=10000"
    short = config("training.steps=500", "training.warmup_steps=null")
    open_run(short, run, fresh=[])
    asked = config(long, "training.warmup_steps=null")
    assert keep_warmup(asked, run, fresh=[]) is asked  # nothing has begun
    assert keep_warmup(asked, tmp_path / "none", fresh=[]) is asked
    (run / "unet1" / "step_00000400").mkdir(parents=True)
    kept = keep_warmup(asked, run, fresh=[])
    assert [stage.warmup_steps for stage in kept.stages()] == [50, 1000]
    assert [learning_rate(kept.stage(1), step) for step in (48, 49, 50)] == pytest.approx(
        [0.98e-3, 1e-3, 1e-3]
    )
    assert keep_warmup(asked, run, fresh=[1]) is asked
    written = (run / "config.json").read_text()
    (run / "config.json").write_text("{")  # what is trained anew asks nothing of it
    assert keep_warmup(asked, run, fresh=[1, 2]) is asked
    (run / "config.json").write_text(written)
    told = []
    check_run(kept, run, told.append, resume=False, fresh=[])
    assert "changed since this run was started: training.warmup_steps: None -> [50, 1000]" in told
    open_run(kept, run, fresh=[])
    again = keep_warmup(asked, run, fresh=[])  # the same command once more
    assert [stage.warmup_steps for stage in again.stages()] == [50, 1000]
    written = config(long, "training.warmup_steps=7")
    assert keep_warmup(written, run, fresh=[]) is written
    shorter = config("training.steps=40", "training.warmup_steps=null")
    assert keep_warmup(shorter, run, fresh=[]) is shorter  # it would not be below the steps


def test_what_does_not_matter_is_not_mentioned(run):
    changes = (
        "training.micro_batch=2",
        'deepspeed.zero_optimization={"stage":3}',
        "logging.log_every=7",
        "data.num_workers=1",
    )
    assert check(run, *changes) == []


def test_fresh_deletes_the_unets_it_is_asked_for_and_nothing_else(run):
    for name in ("unet1/step_00000001/x", "unet2/step_00000001/x", "samples/00000.png",
                 "samples/unet2_step_00000001.png"):  # fmt: skip
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    open_run(config(), run, fresh=[2])
    assert (run / "unet1" / "step_00000001").is_dir()
    assert not (run / "unet2").exists()
    assert [path.name for path in (run / "samples").iterdir()] == ["00000.png"]


def test_what_starts_left_that_were_killed_as_they_took_the_run_is_cleared(tmp_path):
    run = tmp_path / "killed"
    run.mkdir()
    held = owner_path(run, 1)
    half = temporary_path(held.with_name(f"{held.name}.0f"))
    # There is no process of such a number.
    left = half.with_name(half.name.replace(f"-{os.getpid()}.", "-4194305."))
    for path in (held, left):
        path.touch()
    check(run)
    open_run(config(), run, fresh=[])
    assert {path.name for path in run.iterdir()} == {held.name, "config.json"}


def test_a_split_with_an_empty_part_is_refused():
    def check(*changes):
        wanted = config('data.names=["sun","key"]', *changes)
        check_split(wanted, open_source(wanted.data))

    check()
    with pytest.raises(DataError, match=r"0\.01 of 2 pictures leaves none to hold out"):
        check("data.val_fraction=0.01")
    with pytest.raises(DataError, match="none to train on"):
        check("data.val_fraction=0.999")


def test_unet_numbers():
    assert unet_numbers(config(), None) == [1, 2]
    assert unet_numbers(config(), 2) == [2]
    assert unet_numbers(config("imagen.only_train_unet_number=1"), None) == [1]
    with pytest.raises(UsageError, match="unet 3: this cascade has U-Nets 1 to 2"):
        unet_numbers(config(), 3)


def test_a_declared_text_width_must_be_the_encoders():
    check_text_width(config(), 384)
    other = config("imagen.text_encoder_name=/some/folder", "unets.1.text_embed_dim=512")
    with pytest.raises(ConfigError, match=r"unets\.1\.text_embed_dim: 512, .* gives 256"):
        check_text_width(other, 256)
