"""The negative prompt: what guidance makes of it in every runtime, and where it is refused."""

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
from imagen_scale.models.unet import TextCond
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.groups import stream_groups
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.residents import Residents
from imagen_scale.sampling.runtimes.contract import Conditioning, Text
from imagen_scale.sampling.runtimes.opening import open_runtime
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.runtimes.torch_unet import TorchRuntime, load_unet
from imagen_scale.sampling.stage import Listener
from imagen_scale.sampling.stages import TrainedStages
from imagen_scale.sampling.wanted import Wanted

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


def by_onnx(run, options, **runtime):
    return TrainedStages.load(run, runtime=RuntimeOptions(**runtime)).sample(["sun"], options)


def test_an_export_takes_it_and_draws_the_same_as_torch(exported):
    for cond_scale in (3.0, [3.0, 2.0], [0.0, 1.0]):  # of 0 it is the only text
        options = make(steps=3, cond_scale=cond_scale, negative_prompt="pizza")
        ours, theirs = by_onnx(exported, options, runtime="onnx"), by_onnx(exported, options)
        plain = by_onnx(exported, options.changed(negative_prompt=None), runtime="onnx")
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1 / 255, rtol=0)
        assert (ours[0] - plain[0]).abs().max() > 1 / 255


def test_guidance_may_differ_from_picture_to_picture(exported):
    scales = ((3.0, 1.0), (1.5, 2.0), (1.0, 0.0))
    wanted = [Wanted("sun", seed, scale) for seed, scale in enumerate(scales)]
    for runtime, negative in (("torch", "pizza"), ("onnx", None)):
        cascade = TrainedStages.load(exported, runtime=RuntimeOptions(runtime=runtime))
        cascade.residents, cascade.remembered = Residents(CPU), {}
        options = make(steps=2, negative_prompt=negative)
        settings = cascade.settings(options)
        together = stream_groups(cascade, wanted, settings, options, Listener())
        for one, picture in zip(wanted, together, strict=True):
            own = options.changed(seed=one.seed, cond_scale=list(one.cond_scales))
            for ours, alone in zip(picture.stages, cascade.sample(["sun"], own), strict=True):
                torch.testing.assert_close(ours, alone[0], atol=1 / 255, rtol=0)


def test_in_a_graph_each_image_is_led_away_from_its_own_text(exported):
    """The branch without text for one, a prompt for the other: two passes by hand."""
    file = read_inference(inference_path(exported, 1))
    graph, network = open_runtime(file, CPU, RuntimeOptions(runtime="onnx")), load_unet(file)
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([10.0, 90.0])
    embeds = torch.randn(2, 5, 384, generator=generator)
    text, prompt = (network.condition_text(e, torch.ones(len(e), 5).bool())
                    for e in (embeds, embeds[:1] + 1))  # fmt: skip
    null = TextCond(*(torch.cat(pair) for pair in zip(network.null_text(1), prompt, strict=True)))
    scales = torch.tensor([3.0, 2.0])
    found = graph.executor(guided=True)(
        {"x_t": x_t, "t": t, "text_tokens": text.tokens, "text_hidden": text.hidden,
         "null_tokens": null.tokens, "null_hidden": null.hidden, "cond_scale": scales}
    )  # fmt: skip
    with_text, away = (network.denoise(x_t, t, cond) for cond in (text, null))
    expected = guide(with_text, away, scales[:, None, None, None])
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=3e-5)


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
