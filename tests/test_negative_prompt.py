"""The negative prompt: what guidance makes of it, and where it is refused instead of ignored."""

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from support.noise import implied_noise

from imagen_scale import Cascade as PythonCascade
from imagen_scale.commands.main import main
from imagen_scale.diffusion.guidance import guide
from imagen_scale.errors import UsageError
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.contract import Conditioning, Text
from imagen_scale.sampling.runtimes.opening import open_runtime
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.runtimes.torch_unet import TorchRuntime
from imagen_scale.sampling.stages import TrainedStages

CPU = torch.device("cpu")
make = SamplingOptions.make


def sample(run, **options):
    """Both branches of guidance in passes of their own, so that equal inputs give equal bits."""
    cascade = TrainedStages.load(run, runtime=RuntimeOptions(runtime="torch", sequential=True))
    return cascade.sample(["sun"], make(**{"steps": 3, "cond_scale": [4.0, 2.0]} | options))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm", "heun"])
def test_the_prompt_as_its_own_negative_is_no_guidance(run, sampler):
    """eps_neg + s (eps_pos - eps_neg) with eps_pos = eps_neg."""
    against_itself = sample(run, negative_prompt="sun", sampler=sampler)
    plain = sample(run, cond_scale=[1.0, 1.0], sampler=sampler)
    guided = sample(run, sampler=sampler)
    for one, other, third in zip(against_itself, plain, guided, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, third)


@pytest.mark.parametrize("empty", [None, ""])
def test_without_one_the_pixels_are_those_of_the_branch_without_text(run, empty):
    for one, other in zip(sample(run, negative_prompt=empty), sample(run), strict=True):
        assert torch.equal(one, other)


def test_it_acts_in_every_guided_stage_and_in_no_other(run):
    plain, both = sample(run), sample(run, negative_prompt="pizza")
    assert not torch.equal(plain[0], both[0])
    first = (
        sample(run, cond_scale=[1.0, 2.0]),
        sample(run, cond_scale=[1.0, 2.0], negative_prompt="pizza"),
    )
    assert torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][1], first[1][1])


@torch.no_grad()
@pytest.mark.parametrize("cond_scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("options", [RuntimeOptions(), RuntimeOptions(sequential=True)])
def test_the_prediction_is_two_passes_by_hand(run, options, cond_scale):
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 3, 16, 16, generator=generator)
    text, negative = (
        Text(torch.randn(rows, 5, 384, generator=generator), torch.ones(rows, 5).bool())
        for rows in (2, 1)
    )
    t = torch.tensor([10, 90])
    runtime = TorchRuntime(read_inference(inference_path(run, 1)), CPU, options)
    found = runtime.bind(Conditioning(text, cond_scale, negative=negative))(x_t, t)
    positive = runtime.unet(x_t, t, *text)
    away = runtime.unet(x_t, t, negative.embeds.expand(2, -1, -1), negative.mask.expand(2, -1))
    noise = implied_noise(runtime.schedule, x_t, t, found)
    torch.testing.assert_close(noise, guide(positive, away, cond_scale), atol=2e-5, rtol=0)


def test_many_pictures_and_tiles_take_it_too(run):
    cascade = TrainedStages.load(run)
    options = {"steps": 2, "cond_scale": [3.0, 2.0], "negative_prompt": "pizza"}
    whole = cascade.sample(["sun", "key"], make(num=2, **options))
    parts = cascade.sample(["sun", "key"], make(num=2, at_once=1, **options))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    tiled, plain = (
        cascade.sample(["sun"], make(tile=16, **options | {"negative_prompt": negative}))[1]
        for negative in ("pizza", None)
    )
    assert not torch.equal(tiled, plain)


def test_without_any_guidance_it_is_refused_before_any_work(run):
    with pytest.raises(UsageError, match=r"every cond_scale is 1, which is none; give one"):
        TrainedStages.load(run).stream(["sun"], make(cond_scale=1.0, negative_prompt="pizza"))


def test_exports_refuse_it_and_auto_takes_torch_and_says_why(exported):
    message = "runtime onnx: takes no negative_prompt, since .* take runtime torch"
    onnx = RuntimeOptions(runtime="onnx")
    with pytest.raises(UsageError, match=message):
        TrainedStages.load(exported, runtime=onnx).stream(["sun"], make(negative_prompt="pizza"))
    file = read_inference(inference_path(exported, 1))
    with pytest.raises(UsageError, match=message):
        open_runtime(file, CPU, onnx, negative=True)
    graph = open_runtime(file, CPU, onnx)
    text = Text(torch.zeros(1, 5, 384), torch.ones(1, 5).bool())
    with pytest.raises(UsageError, match="takes no negative_prompt"):
        graph.bind(Conditioning(text, 3.0, negative=text))
    said = []
    cascade = TrainedStages.load(exported, runtime=RuntimeOptions(), say=said.append)
    options = make(steps=2, negative_prompt="pizza")
    (picture,) = cascade.stream(["sun"], options)
    assert said[0].startswith("U-Net 1: runtime torch fp32 on cpu; not onnx: its graphs take no")
    # The second stage samples without guidance: nothing to lead away from, so the graph serves.
    assert "onnx" in picture.runtimes[1]
    by_torch = TrainedStages.load(exported).sample(["sun"], options)
    assert torch.equal(by_torch[0][0], picture.stages[0])


def test_the_command_the_facts_and_python_agree(run, tmp_path):
    def files(*flags):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        done = CliRunner().invoke(
            main, ["sample", "sun", "--run", str(run), "--out", str(out), "--steps", "3", *flags]
        )
        assert done.exit_code == 0, done.output
        (facts,) = out.glob("0*.json")
        return json.loads(facts.read_text()), np.asarray(Image.open(facts.with_suffix(".png")))

    facts, pixels = files("--negative-prompt", "pizza")
    assert facts["negative_prompt"] == "pizza"
    plain_facts, plain = files()
    empty_facts, empty = files("--negative-prompt", "")
    assert plain_facts == empty_facts and plain_facts["negative_prompt"] is None
    np.testing.assert_array_equal(plain, empty)
    assert (pixels != plain).any()
    python = PythonCascade.load(run)
    (picture,) = python.sample("sun", steps=3, negative_prompt="pizza")
    np.testing.assert_array_equal(np.asarray(picture), pixels)
    with pytest.raises(
        UsageError, match=re.escape("negative_prompt 3: it should be a valid string")
    ):
        python.sample("sun", negative_prompt=3)


def test_the_command_says_which_runtime_can(run, tmp_path):
    done = CliRunner().invoke(
        main, ["sample", "sun", "--run", str(run), "--out", str(tmp_path), "--negative-prompt",
               "pizza", "--runtime", "onnx"],
    )  # fmt: skip
    assert done.exit_code == 2
    assert "--runtime onnx: takes no --negative-prompt" in done.output
    assert "Traceback" not in done.output
