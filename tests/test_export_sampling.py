"""Sampling through an export: the same pictures as with torch, and "auto" takes it."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from imagen_scale.commands.main import main
from imagen_scale.errors import ExportError
from imagen_scale.files.pictures import to_uint8
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stages import TrainedStages


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
def test_same_seed_same_pixels(exported, sampler):
    ours, theirs = (
        to_uint8(
            TrainedStages.load(exported, runtime=RuntimeOptions(runtime=name)).sample(
                ["sun", "key"], SamplingOptions(steps=5, sampler=sampler)
            )[1]
        )
        for name in ("onnx", "torch")
    )
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_auto_takes_the_export_and_says_so(exported, tmp_path):
    arguments = ["sample", "sun", "--run", exported, "--out", tmp_path, "--steps", 2]
    done = CliRunner().invoke(main, [str(part) for part in arguments])
    assert done.exit_code == 0, done.output
    assert "U-Net 2: runtime onnxruntime" in done.output
    (facts,) = tmp_path.glob("*.json")
    assert all("onnx" in stage["runtime"] for stage in json.loads(facts.read_text())["stages"])


def test_tiles_through_a_graph_of_any_size_and_refused_by_a_static_one(exported, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "in.png")
    images = []
    for name in ("onnx", "torch"):
        out = tmp_path / f"{name}.png"
        arguments = ["upscale", tmp_path / "in.png", "--run", exported, "--tile", 48, "--steps", 2,
                     "--runtime", name, "--out", out]  # fmt: skip
        done = CliRunner().invoke(main, [str(part) for part in arguments])
        assert done.exit_code == 0, done.output
        images.append(np.asarray(Image.open(out)).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1
    with pytest.raises(ExportError, match="takes images of 32 px"):
        half = RuntimeOptions(runtime="onnx", precision="fp16")
        TrainedStages.load(exported, runtime=half).stage(2, tile=48)
