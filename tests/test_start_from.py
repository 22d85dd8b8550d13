"""Training that starts from another run's weights: from these bit for bit, and from no others."""

import json
import shutil

import pytest
import torch
from support.runs import losses, weights
from support.tiny import TINY, write_run, write_stage

from imagen_scale.config import parse_config
from imagen_scale.errors import CheckpointError, ConfigError
from imagen_scale.runs.checkpoint import MANIFEST
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.training.may_continue import check_run
from imagen_scale.training.origin import check_encoder, find_origin, read_origin


def configured(*overrides):
    return parse_config(json.dumps(TINY), overrides=overrides)


def find(config, run_dir, number=1, **flags):
    return find_origin(config, number, run_dir, **{"fresh": False} | flags)


def start(run):
    return f"training.start_from={run}"


def test_one_run_or_one_for_each_unet(run, tmp_path):
    assert find(configured(), tmp_path) is None
    both = configured(start(run))
    assert [find(both, tmp_path, n).file.unet_number for n in (1, 2)] == [1, 2]
    second = configured(f'training.start_from=[null,"{run}"]')
    assert find(second, tmp_path, 1) is None and find(second, tmp_path, 2) is not None
    with pytest.raises(ConfigError, match="start_from: 1 values for 2 U-Nets"):
        configured(f'training.start_from=["{run}"]')


def test_a_run_in_the_home_is_found(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    assert find(configured(start(f"~/{run.name}")), tmp_path).file.path == inference_path(run, 1)


def test_another_prediction_schedule_and_size_may_start_from_it(run, tmp_path):
    changes = ("unets.0.pred_type=v", 'unets.0.schedule={"type":"cosine"}',
               "imagen.image_sizes=[32,64]")  # fmt: skip
    config = configured(start(run), *changes)
    said = find(config, tmp_path).said_of(config.stage(1))
    assert said == (f"U-Net 1: starts from the weights of {run} (step 6); it predicted eps there "
                    f"and learns v here")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("unets.0.dim=16", "unets.0.dim: 16, but .* has 8; .* write 8"),
        ("unets.0.layer_attns=true", r"unets.0.layer_attns: \[true, true\], but .*\[false, true\]"),
        ("unets.0.max_text_len=9", "unets.0.max_text_len: 9, but .* has 8"),
    ],
)
def test_another_network_is_refused_by_name(change, said, run, tmp_path):
    with pytest.raises(ConfigError, match=said):
        find(configured(start(run), change), tmp_path)


def test_what_is_no_trained_stage_is_refused(tmp_path):
    run = write_run(tmp_path / "x")
    own = configured(start(run))
    with pytest.raises(ConfigError, match="start_from: .* is this run itself"):
        find(own, tmp_path / "y" / ".." / "x")
    with pytest.raises(ConfigError, match=r"start_from: .*no-run has no trained U-Net 2 \(.*unet2"):
        find(configured(start(tmp_path / "no-run")), tmp_path, 2)
    write_stage(run, 1, step=3)
    with pytest.raises(ConfigError, match=r"U-Net 1 of .* is half-trained \(3 of 6 steps\); run"):
        find(own, tmp_path)
    inference_path(run, 2).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        find(own, tmp_path, 2)
    write_stage(run, 1, fingerprint="0123456789abcdef")
    with pytest.raises(ConfigError, match="text.encoder: 'minilm' here is not the one"):
        check_encoder(find(own, tmp_path), "fedcba9876543210", "minilm")


@pytest.mark.distributed
def test_a_training_starts_with_these_weights_and_continues_without_them(launch, tmp_path):
    """At a rate of nothing they stay; the checkpoint stands for them from then on."""
    run = write_run(tmp_path / "first")
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY | {"deepspeed": {}}))
    still = (start(run), "training.lr=1e-30", "training.weight_decay=0", "unets.0.pred_type=v",
             "--unet", "1")  # fmt: skip
    done = launch(config, tmp_path / "still", *still)
    assert "U-Net 1: starts from the weights of" in done.stdout
    assert "predicted eps there and learns v here" in done.stdout
    theirs = weights(run)
    for name, value in weights(tmp_path / "still").items():
        assert torch.equal(value, theirs[name]), name
    sha256 = read_origin(configured(), 1, run, tmp_path, key="").sha256
    assert read_inference(inference_path(tmp_path / "still", 1)).origin_sha256 == sha256

    options = (start(run), "--unet", "1")
    launch(config, tmp_path / "whole", *options)
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")  # as a kill after step 3 leaves it
    shutil.rmtree(cut / "unet1" / "step_00000006")
    inference_path(cut, 1).unlink()
    shutil.rmtree(run)  # nothing of it is needed any more
    launch(config, cut, *options)
    assert losses(cut) == losses(tmp_path / "whole")
    manifest = json.loads((cut / "unet1" / "step_00000006" / MANIFEST).read_text())
    assert manifest["origin"] == sha256
    with pytest.raises(ConfigError, match="training.start_from: .* -> None"):
        check_run(configured(), cut, print, resume=False, fresh=[])
