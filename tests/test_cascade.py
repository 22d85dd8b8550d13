"""Sampling a saved cascade, the command line around it, and what refuses to be sampled."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.tiny import TINY, write_run, write_stage

from imagen_scale.commands.main import main
from imagen_scale.config import parse_config
from imagen_scale.data.encoder import TextEncoder
from imagen_scale.diffusion.names import Sampler
from imagen_scale.errors import CheckpointError, EnvironmentProblem, UsageError
from imagen_scale.files.atomic import sha256
from imagen_scale.files.numbers import by_number, next_number
from imagen_scale.files.picture_files import save_sample
from imagen_scale.files.pictures import to_uint8
from imagen_scale.runs.folders import find_run, inference_path
from imagen_scale.runs.inference import load_weights, read_inference
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.stages import TrainedStages
from imagen_scale.sampling.upscale import Upscaler

make = SamplingOptions.make


def sample(run, *prompts, **options):
    return TrainedStages.load(run).sample(prompts, make(**{"steps": 3} | options))


def test_shapes_and_range(run):
    base, large = sample(run, "red heart", "sun", num=2)
    assert base.shape == (4, 3, 16, 16)
    assert large.shape == (4, 3, 32, 32)
    assert large.abs().max() <= 1
    assert large.isfinite().all()


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_same_seed_same_picture_whatever_stands_beside(run, sampler):
    alone = sample(run, "sun", seed=1, sampler=sampler)
    beside = sample(run, "red heart", "sun", seed=0, num=2, sampler=sampler)
    for ours, theirs in zip(alone, beside, strict=True):
        torch.testing.assert_close(ours[0], theirs[3], atol=1e-3, rtol=0)  # 1/255 is 8e-3
    other = sample(run, "sun", seed=2, sampler=sampler)
    assert (other[0] - alone[0]).abs().max() > 0.01


def test_prompts_matter(run):
    torch_run = sample(run, "red heart", "sun", cond_scale=8.0)[0]
    assert (torch_run[0] - torch_run[1]).abs().max() > 1e-3


def test_a_large_batch_is_sampled_in_parts_with_the_same_pictures(run, monkeypatch):
    whole = sample(run, "red heart", num=5)
    monkeypatch.setattr("imagen_scale.sampling.stage.PIXELS_AT_ONCE", 2 * 32 * 32)
    parts = sample(run, "red heart", num=5)
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_inference_files_carry_the_weights_and_the_configuration(tmp_path):
    unet = write_stage(tmp_path, 1)
    file = read_inference(inference_path(tmp_path, 1))
    assert file.config == parse_config(json.dumps(TINY))
    weights = load_weights(file.path)
    for name, value in unet.state_dict().items():
        assert torch.equal(weights[name], value)


def test_a_stage_that_does_not_fit_ends_in_advice(run, monkeypatch):
    """The accident of a 12 GB card: the first stage fits, the second one does not."""

    def load(path):
        if "unet2" in str(path):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load_weights(path)

    monkeypatch.setattr("imagen_scale.sampling.runtimes.torch_unet.load_weights", load)
    advice = "memory is too small. Make fewer pictures at once"
    with pytest.raises(EnvironmentProblem, match=advice):
        sample(run, "sun")
    upscaler = Upscaler(run, 2)
    with pytest.raises(EnvironmentProblem, match=advice):
        upscaler(torch.zeros(3, 16, 16), None, SamplingOptions(steps=1))


def test_text_is_encoded_where_the_stages_are_and_leaves_nothing_there(run, monkeypatch):
    made = []

    class Spy(TextEncoder):
        def __init__(self, folder, device=None):
            made.append((self, device))
            super().__init__(folder, device)

    monkeypatch.setattr("imagen_scale.sampling.prompts.TextEncoder", Spy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # another card, of no concern
    stages = TrainedStages.load(run, torch.device("cpu"))
    stages.sample(["sun"], SamplingOptions(steps=1))
    ((encoder, device),) = made
    assert device == encoder._device == torch.device("cpu")
    assert not hasattr(encoder, "_model")


def test_missing_and_half_trained_stages_are_named(tmp_path):
    write_stage(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"U-Net 2 is not trained yet.*unet_limit 1"):
        TrainedStages.load(tmp_path)
    assert len(TrainedStages.load(tmp_path, unet_limit=1).files) == 1
    write_stage(tmp_path, 2, step=3)
    with pytest.raises(CheckpointError, match=r"U-Net 2 is half-trained \(3 of 6 steps\)"):
        TrainedStages.load(tmp_path)
    assert len(TrainedStages.load(tmp_path, allow_unfinished=True).files) == 2
    with pytest.raises(UsageError, match="U-Nets 1 to 2"):
        TrainedStages.load(tmp_path, unet_limit=3)


def test_another_text_encoder_is_refused(tmp_path):
    write_stage(tmp_path, 1, fingerprint="0" * 16)
    with pytest.raises(CheckpointError, match="another version of the text encoder 'minilm'"):
        TrainedStages.load(tmp_path, unet_limit=1).sample(["sun"], make(steps=1))


def test_damaged_and_foreign_files_are_refused(tmp_path):
    write_stage(tmp_path, 1)
    path = inference_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        read_inference(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not an inference file"):
        read_inference(path)


CHANNELS = ["imagen.channels=1", "unets.0.channels=1", "unets.1.channels=1"]


def test_pictures_of_other_channels_are_not_drawn(tmp_path):
    """Training refuses them; a file made by other means says so before any work."""
    write_stage(tmp_path, 1, overrides=CHANNELS)
    with pytest.raises(CheckpointError, match=r"draws 1 channels \(imagen\.channels\)"):
        TrainedStages.load(tmp_path, unet_limit=1)


def say_otherwise(path, **facts):
    """Writes an inference file anew that says other things of itself; None: nothing."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        facts = file.metadata() | facts
    known = {name: fact for name, fact in facts.items() if fact is not None}
    save_file(load_weights(path), path, metadata=known)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        *(({name: None}, f"damaged (what it says of itself: '{name}')")
          for name in ("config", "unet_number", "text_embed_dim", "text_fingerprint", "step",
                       "steps")),
        ({"step": "six"}, "damaged (what it says of itself: invalid literal for int()"),
        ({"steps": "9" * 5000}, "damaged (what it says of itself: Exceeds the limit"),
        ({"unet_number": "0"}, "damaged (it is of U-Net 0, and its cascade has U-Nets 1 to 2)"),
        ({"unet_number": "3"}, "damaged (it is of U-Net 3, and its cascade has U-Nets 1 to 2)"),
        ({"unet_number": "2"}, "is of U-Net 2, not 1. Put it where that one's is"),
    ],
)  # fmt: skip
def test_a_file_that_says_what_cannot_be_is_damaged(tmp_path, facts, message):
    write_stage(tmp_path, 1)
    path = inference_path(tmp_path, 1)
    say_otherwise(path, **facts)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: {message}")):
        TrainedStages.load(tmp_path, unet_limit=1)


def test_a_file_in_the_place_of_another_stages_is_refused(tmp_path):
    write_run(tmp_path)
    shutil.copy(inference_path(tmp_path, 1), inference_path(tmp_path, 2))
    with pytest.raises(CheckpointError, match=r"unet2/.*: is of U-Net 1, not 2\. Put it where"):
        TrainedStages.load(tmp_path)
    done = cli("sample", "sun", "--run", tmp_path)
    assert done.exit_code == 1 and "is of U-Net 1, not 2" in done.output


def alone(run, size):
    """The file of a first stage that was trained without a second one."""
    changes = (f"imagen.image_sizes=[{size}]", f"unets={json.dumps(TINY['unets'][:1])}")
    write_stage(run, 1, overrides=changes)
    return inference_path(run, 1)


def test_how_many_stages_there_are_is_the_runs_to_say(tmp_path):
    run = write_run(tmp_path / "run")
    shutil.copy(alone(tmp_path / "first", 16), inference_path(run, 1))
    assert [one.shape[-1] for one in sample(run, "sun")] == [16, 32]
    (run / "config.json").unlink()  # then the first file has to say it
    assert [one.shape[-1] for one in sample(run, "sun")] == [16]


def test_a_file_of_a_run_of_other_sizes_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    shutil.copy(alone(tmp_path / "first", 24), inference_path(run, 1))
    with pytest.raises(
        CheckpointError, match=r"unet1/.*: was trained for 24 px, and the run is of 16 px\. Put"
    ):
        TrainedStages.load(run)
    write_run(run)
    write_stage(tmp_path / "other", 2, overrides=["imagen.image_sizes=[16,48]"])
    shutil.copy(inference_path(tmp_path / "other", 2), inference_path(run, 2))
    with pytest.raises(CheckpointError, match="trained for 16 -> 48 px, .* of 16 -> 32 px"):
        TrainedStages.load(run)


def test_newest_run_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no run found under"):
        find_run(None)
    import os

    for age, name in enumerate(["old", "new"]):
        write_stage(tmp_path / "runs" / name, 1)
        for path in (tmp_path / "runs" / name).rglob("*"):
            os.utime(path, (1e9 + age, 1e9 + age))
    assert find_run(None).name == "new"
    with pytest.raises(UsageError, match="not a run folder"):
        find_run(tmp_path / "other")


def cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_shards_of_a_list_are_the_list(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("sun\nkey\npizza")

    def made(folder, *flags):
        out = tmp_path / folder
        done = cli("sample", "--run", run, "--from-file", prompts, "--out", out, "--steps", 1,
                   "--seed", 7, "--num", 2, "--unet-limit", 1, *flags)  # fmt: skip
        assert done.exit_code == 0, done.output
        return done.output

    def pictures(folder):
        for path in (tmp_path / folder).glob("0*.json"):
            facts = json.loads(path.read_text())
            image = Image.open(path.with_suffix(".png"))
            yield facts["prompt"], facts["seed"], np.asarray(image).astype(int)

    made("whole")
    for shard in ("2/2", "1/2"):
        made("shards", "--shard", shard)
    assert "none of the 3 prompts is left" in made("shards", "--shard", "4/4")
    whole, shards = (sorted(pictures(folder), key=lambda one: one[:2])
                     for folder in ("whole", "shards"))  # fmt: skip
    assert [one[:2] for one in whole] == [one[:2] for one in shards] and len(whole) == 6
    for (*_, one), (*_, other) in zip(whole, shards, strict=True):
        assert np.abs(one - other).max() <= 1
    names = sorted(path.name[:5] for path in (tmp_path / "shards").glob("0*.png"))
    assert names == [f"{number:05d}" for number in range(1, 7)]
    assert len(list((tmp_path / "shards").glob("grid_*.png"))) == 2


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/0", "-1/2", "a/b", "1/2/3", "1/ 2"])
def test_a_shard_that_is_none_is_refused(run, shard):
    done = cli("sample", "sun", "--run", run, f"--shard={shard}")
    assert done.exit_code == 2 and f"--shard {shard}: it should be I/N" in done.output


def test_command_writes_pictures_facts_and_a_grid(run, tmp_path):
    out = tmp_path / "out"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffpizza\n\n  rocket  \n", encoding="utf-8")
    arguments = ("sample", "../red/heart", "--run", run, "--out", out, "--steps", "3,2",
                 "--from-file", prompts, "--seed", 5, "--runtime", "torch")  # fmt: skip
    done = cli(*arguments)
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in out.iterdir())
    assert len(names) == 7
    for i, name in enumerate(names[:6]):
        assert re.fullmatch(rf"0000{i // 2 + 1}_[0-9a-f]{{8}}\.{('json', 'png')[i % 2]}", name)
    assert names[6] == "grid_00001.png"
    facts = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    assert [fact["prompt"] for fact in facts] == ["../red/heart", "pizza", "rocket"]
    assert facts[0]["seed"] == 5
    assert [stage["steps"] for stage in facts[0]["stages"]] == [3, 2]
    assert [stage["cond_scale"] for stage in facts[0]["stages"]] == [3, 1]
    hashes = [sha256(inference_path(run, number)) for number in (1, 2)]
    assert [stage["model_sha256"] for stage in facts[0]["stages"]] == hashes
    with Image.open(out / names[1]) as image:
        assert image.size == (32, 32)
        first = np.asarray(image)
    # Again: the same picture, the same hash, a new number; nothing is overwritten.
    cli(*arguments)
    (again,) = out.glob(f"00004_{names[1][6:14]}.png")
    with Image.open(again) as image:
        assert (np.asarray(image) == first).all()


@given(prompt=st.text(min_size=1))
def test_prompts_never_become_file_names(tmp_path_factory, prompt):
    folder = tmp_path_factory.mktemp("names")
    path = save_sample(folder, 7, np.zeros((2, 2, 3), np.uint8), {"prompt": prompt})
    assert re.fullmatch(r"00007_[0-9a-f]{8}\.png", path.name)
    assert sorted(folder.iterdir()) == [path.with_suffix(".json"), path]
    assert json.loads(path.with_suffix(".json").read_text("utf-8"))["prompt"] == prompt
    assert next_number(folder) == 8


def test_interrupted_work_keeps_every_picture_made(run, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, "-c", "from imagen_scale.commands.main import main; main()",
        "sample", "sun", "--run", run, "--out", out, "--num", 60, "--at-once", 1, "--steps", "5,50",
        "--runtime", "torch",
    ]  # fmt: skip
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(out.glob("*.png"))) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 130, error
    pictures = sorted(out.glob("*.png"))
    assert f"interrupted: {len(pictures)} of 60 pictures are in" in error
    for path in pictures:
        with Image.open(path) as image:
            image.load()
        assert path.with_suffix(".json").is_file()
    # What was made is what an uninterrupted run makes.
    whole = to_uint8(TrainedStages.load(run).sample(["sun"], make(num=2, steps=[5, 50]))[-1])
    with Image.open(pictures[1]) as image:
        assert np.abs(np.asarray(image).astype(int) - whole[1]).max() <= 1


def test_many_pictures_go_through_in_groups_with_the_same_result(run, monkeypatch):
    whole = sample(run, "red heart", "sun", num=3)
    monkeypatch.setattr("imagen_scale.sampling.groups.GROUP", 4)
    grouped = sample(run, "red heart", "sun", num=3)
    for ours, theirs in zip(grouped, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_settings_per_stage(run):
    cascade = TrainedStages.load(run)
    base, large = cascade.settings(make(steps=[9, 4], sampler=["ddim", "heun"], threshold=0.8))
    assert (base.steps, base.sampler, base.cond_scale, base.threshold) == (9, "ddim", 3, 0.8)
    assert (large.steps, large.sampler, large.cond_scale, large.threshold) == (4, "heun", 1, 0.8)
    assert [one.cond_scale for one in cascade.settings(make(cond_scale=[2, 5]))] == [2, 5]
    assert [one.threshold for one in cascade.settings(make())] == [0.9, 0.9]
    # Each stage really takes its own: changing the second leaves the first picture alone.
    one, other = (cascade.sample(["sun"], make(steps=[3, steps])) for steps in (2, 5))
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": [1, 2, 3]}, "steps: 3 values for 2 stage"),
        ({"cond_scale": float("nan")}, "cond_scale nan: it should be a finite number"),
        ({"threshold": 0.0}, "threshold 0.0: it should be greater than 0"),
        ({"sampler": "ddim", "eta": 1.5}, "eta 1.5: it should be less than or equal to 1"),
        ({"eta": 0.5}, "eta 0.5: goes with sampler ddim"),
        ({"steps": 101}, "steps 101: U-Net 1 has 100 times (imagen.timesteps); take at"),
        ({"steps": [100, 101]}, "steps 101: U-Net 2 has 100 times"),
    ],
)
def test_settings_that_cannot_work_are_named(run, settings, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        TrainedStages.load(run).settings(make(**settings))


def test_steps_that_nobody_asked_for_are_as_many_as_there_are_times():
    stages = parse_config(json.dumps(TINY), overrides=("imagen.timesteps=21",)).stages()
    assert [one.steps for one in make().for_stages(list(stages))] == [21, 21]
    assert [one.steps for one in make(seed=1).changed(num=2).for_stages(list(stages))] == [21, 21]
    with pytest.raises(UsageError, match="has 21 times"):
        make(steps=25).for_stages(list(stages))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample"], "no prompt: give one or more"),
        (["sample", "x", "--run", "nowhere"], "nowhere: not a run folder"),
        (["sample", "--from-file", "nowhere.txt"], "--from-file nowhere.txt: cannot be read"),
        (["config", "check", "nowhere.json"], "nowhere.json: cannot be read"),
        (["prepare", "--config", "nowhere.json"], "nowhere.json: cannot be read"),
        (["evaluate", "--run", "nowhere"], "nowhere: not a run folder"),
        (["sample", "x", "--sampler", "ddim,euler"], "'euler' is not one of"),
        (["sample", "x", "--steps", "5,0"], "0 is not in the range"),
        (["upscale", "x.png", "--run", "nowhere"], "nowhere: not a run folder"),
    ],
)
def test_wrong_use_ends_in_one_sentence_and_exit_code_2(arguments, message):
    done = cli(*arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_missing_stage_exits_1(tmp_path):
    write_stage(tmp_path, 1)
    done = cli("sample", "sun", "--run", tmp_path)
    assert done.exit_code == 1
    assert "U-Net 2 is not trained yet" in done.output


def test_config_commands(tmp_path, tiny_config):
    done = cli("config", "check", tiny_config)
    assert done.exit_code == 0
    assert "valid; 2 U-Net(s), 16 -> 32 px" in done.output
    schema = json.loads(cli("config", "schema").output)
    assert schema["additionalProperties"] is False
    assert "unets" in schema["properties"]


def test_prepare_names_a_missing_picture_and_prepares_nothing(tmp_path, tiny_config):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a key"}\n')
    cache = tmp_path / "cache"
    done = cli(
        "prepare", "--config", tiny_config, "--set", "data.source=folder", "--set",
        f"data.path={folder}", "--set", "data.names=null", "--set", f"data.cache_dir={cache}",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "line 1" in done.output
    assert "gone.png" in done.output
    assert not list(cache.rglob("*.npy")) and list(cache.rglob("data_report.json"))


def test_prepare_then_everything_is_there(tmp_path, tiny_config):
    cache = tmp_path / "cache"
    done = cli("prepare", "--config", tiny_config, "--set", f"data.cache_dir={cache}")
    assert done.exit_code == 0, done.output
    assert "6 usable: 6 to train on, 0 held out" in done.output
    assert "6 distinct" in done.output
    assert "OpenMoji" in done.output
    assert len(list((cache / "images").glob("*.npy"))) == 2


def test_pictures_that_are_not_finite_are_refused_not_drawn_black(tmp_path):
    def spoil(unet):
        unet.final_conv.bias.fill_(float("nan"))

    write_stage(tmp_path / "run", 1, change=spoil)
    cascade = TrainedStages.load(tmp_path / "run", unet_limit=1)
    with pytest.raises(EnvironmentProblem, match=r"U-Net 1: torch fp32 .* not finite\. Take"):
        cascade.sample(["sun"], SamplingOptions.make(steps=2))


def test_the_last_pictures_seed_can_be_asked_for_again(run):
    cascade = TrainedStages.load(run)
    with pytest.raises(UsageError, match=r"seed 9223372036854775807: the last of 2 pictures"):
        cascade.settings(SamplingOptions(seed=2**63 - 1, num=2))
    assert cascade.settings(SamplingOptions(seed=2**63 - 2, num=2))


def test_a_hundred_thousandth_picture_is_newer_than_the_one_before():
    names = ["100000_ab.png", "99999_cd.png", "00007_ef.png", "sheet_00003.png"]
    ordered = sorted(map(Path, names), key=by_number)
    assert [path.name for path in ordered] == list(reversed(names))
