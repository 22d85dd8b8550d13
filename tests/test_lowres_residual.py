"""Super-resolution that corrects the enlarged picture: it begins with that picture, bit for bit."""

import itertools
import json
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from imagen_scale_export.exporter import ExportOptions, export_unet
from support.tiny import TINY, write_stage

from imagen_scale.config import parse_config
from imagen_scale.data.sequence import Batch
from imagen_scale.diffusion.lowres import enlarge, resize, shrink_and_enlarge
from imagen_scale.diffusion.names import Sampler
from imagen_scale.errors import ConfigError, ExportError, ShapeError
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.sampling.runtimes.contract import Conditioning, Text
from imagen_scale.sampling.runtimes.exported import open_exported
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stage import Inputs, Stage
from imagen_scale.training.building import build_unet
from imagen_scale.training.objective import Objective, crop_at

CPU = torch.device("cpu")
RESIDUAL = ("unets.1.pred_type=x0", "unets.1.lowres_residual=true")
SHALLOW = ("unets.1.dim_mults=[1]", "unets.1.layer_cross_attns=false")
SETUP = SimpleNamespace(offload_activations=False, checkpointing=("none", "none"), zero_stage=0)


def configured(*overrides):
    return parse_config(json.dumps(TINY), overrides=(*RESIDUAL, *overrides))


def random_text(batch):
    generator = torch.Generator().manual_seed(5)
    return Text(torch.randn(batch, 8, 384, generator=generator), torch.ones(batch, 8).bool())


def pictures(batch, size):
    generator = torch.Generator().manual_seed(6)
    return torch.rand(batch, 3, size, size, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The second stage of TINY as training begins with it."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    write_stage(run, 2, change=lambda unet: unet.begin_with_zero(), overrides=RESIDUAL)
    return read_inference(inference_path(run, 2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same with weights of its own, and few of them."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    write_stage(run, 2, overrides=(*RESIDUAL, *SHALLOW))
    return read_inference(inference_path(run, 2))


def test_training_begins_with_a_prediction_of_zero():
    stage = configured().stage(2, 384)
    unet, plain = (build_unet(one, SETUP) for one in
                   (stage, parse_config(json.dumps(TINY)).stage(2, 384)))  # fmt: skip
    for name, weights in unet.state_dict().items():  # all else is drawn as without
        other = plain.state_dict()[name]
        is_last = name.startswith("final_conv")
        assert torch.equal(weights, torch.zeros_like(other) if is_last else other), name


@pytest.mark.parametrize("sampler", get_args(Sampler))
@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
def test_an_untrained_stage_gives_the_enlarged_picture(untrained, sampler, cond_scale):
    small = pictures(2, 16)
    stage = Stage(untrained, CPU)
    settings = StageSettings(steps=3, sampler=sampler, cond_scale=cond_scale, spacing="logsnr")
    found = stage.sample(Inputs(random_text(2), [0, 1], small), settings)
    assert torch.equal(found, resize(small, 32))


def test_a_picture_in_tiles_and_of_any_shape_is_the_enlarged_one(untrained):
    picture = pictures(1, 50)[0][:, :23, :41]
    stage = Stage(untrained, CPU, tile=16)
    found = stage.upscale(picture, random_text(1), 0, StageSettings(steps=2))
    torch.testing.assert_close(found, enlarge(picture[None], 46, 82)[0], atol=2e-6, rtol=0)
    small = pictures(1, 16)
    found = stage.sample(Inputs(random_text(1), [0], small), StageSettings(steps=2))
    torch.testing.assert_close(found, resize(small, 32), atol=2e-6, rtol=0)


@pytest.mark.parametrize("crop", [None, 16])
def test_the_loss_is_that_of_the_clean_picture(crop):
    """Of what is added to the enlarged picture without its noise, x_0 is the right sum."""
    objective = Objective(configured(f"unets.1.crop={json.dumps(crop)}").stage(2), CPU)
    images = pictures(4, 32)
    text = torch.zeros(4, 4, 384), torch.ones(4, 4, dtype=torch.bool)
    batch = Batch(images, *text, torch.arange(4), ["x"] * 4)
    enlarged, corners = shrink_and_enlarge(images, 16), None
    if crop is not None:
        corners = objective.draw(batch.positions, images.shape[1:], "train").corners
        images, enlarged = (crop_at(one, corners, crop) for one in (images, enlarged))
    assert objective.losses(lambda *_: images - enlarged, batch).max() < 1e-12
    begun = objective.losses(lambda *_: torch.zeros_like(images), batch)
    expected = (images - enlarged).square().flatten(1).mean(1)
    torch.testing.assert_close(begun, expected, rtol=1e-5, atol=0)


def test_a_correction_beyond_white_moves_nothing_else(tmp_path):
    """Dynamic thresholding would darken the whole picture; it is there for who asks for it."""

    def brighter(unet):
        unet.begin_with_zero()
        unet.final_conv.bias.fill_(0.5)

    write_stage(tmp_path, 2, change=brighter, overrides=RESIDUAL)
    file = read_inference(inference_path(tmp_path, 2))
    small = pictures(1, 16)
    inputs = Inputs(random_text(1), [0], small)
    for options, expected in (
        (SamplingOptions(steps=2), (resize(small, 32) + 0.5).clamp(-1, 1)),
        (SamplingOptions(steps=2, threshold=1.0), None),
    ):
        (settings,) = options.for_stages([file.stage])
        found = Stage(file, CPU).sample(inputs, settings)
        if expected is None:
            assert found.max() == 1 and found.mean() < resize(small, 32).mean() + 0.4
        else:
            assert torch.equal(found, expected)


def test_an_export_adds_the_picture_too(trained):
    folder = export_unet(trained, ExportOptions(), lambda sentence: None)
    manifest = folder / "manifest.json"
    facts = json.loads(manifest.read_text())
    assert facts["sampler"]["lowres_residual"] is True
    assert facts["verification"]["passed"]
    inputs = Inputs(random_text(2), [0, 1], pictures(2, 16))
    stages = Stage(trained, CPU, RuntimeOptions(runtime="onnx")), Stage(trained, CPU)
    for cond_scale in (1.0, 3.0):
        settings = StageSettings(steps=4, cond_scale=cond_scale, spacing="logsnr")
        torch.testing.assert_close(
            *(stage.sample(inputs, settings) for stage in stages), atol=1e-4, rtol=0
        )
    lowres = {"lowres_img": pictures(2, 32), "lowres_t": torch.zeros(2).long()}
    for stage in stages:
        with pytest.raises(ShapeError, match="base goes with U-Nets of lowres_residual"):
            stage.runtime.bind(Conditioning(inputs.text, 1.0, **lowres))
    del facts["sampler"]["lowres_residual"]  # as if it had been exported from another stage
    manifest.write_text(json.dumps(facts))
    with pytest.raises(ExportError, match="lowres_residual is False there and True here"):
        open_exported("onnx", trained, folder=None, device=CPU)


def test_it_is_for_super_resolution_that_predicts_x_0():
    for number, pred_type in itertools.product((0, 1), ("eps", "v", "x0")):
        changes = (f"unets.{number}.pred_type={pred_type}", f"unets.{number}.lowres_residual=true")
        if (number, pred_type) == (1, "x0"):
            parse_config(json.dumps(TINY), overrides=changes)
            continue
        remedy = "pred_type to x0" if number else "leave it out"
        with pytest.raises(ConfigError, match=f"unets.{number}.lowres_residual: .*{remedy}"):
            parse_config(json.dumps(TINY), overrides=changes)
