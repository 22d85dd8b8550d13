"""Predicted values beyond what a picture can be, where no percentile is configured."""

import json

import pytest
import torch
from imagen_scale_export.bundle import thresholding
from support.tiny import TINY, write_stage

from imagen_scale.config import parse_config
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.manifest import SamplerConstants, sampler_constants
from imagen_scale.sampling.stages import TrainedStages

BEYOND = torch.tensor([1.5, 0.5, -0.25])


@pytest.fixture
def run(tmp_path):
    """A base stage that predicts one colour, red beyond 1, whatever it sees."""

    def one_colour(unet):
        unet.begin_with_zero()
        unet.final_conv.bias.copy_(BEYOND)

    overrides = ("imagen.dynamic_thresholding_percentile=null", "unets.0.pred_type=x0")
    write_stage(tmp_path / "run", 1, change=one_colour, overrides=overrides)
    return tmp_path / "run"


def drawn(run, **options):
    ((picture,),) = TrainedStages.load(run, unet_limit=1).sample(
        ["sun"], SamplingOptions(steps=3, **options)
    )
    return picture


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_they_are_cut_off_and_the_others_stay(run, sampler):
    wanted = BEYOND.clamp(-1, 1)[:, None, None].expand(3, 16, 16)
    torch.testing.assert_close(drawn(run, sampler=sampler), wanted, rtol=0, atol=1e-5)


def test_a_percentile_that_is_asked_for_scales_all_of_them(run):
    wanted = (BEYOND / 1.5)[:, None, None].expand(3, 16, 16)
    torch.testing.assert_close(drawn(run, threshold=1.0), wanted, rtol=0, atol=1e-5)
    near_0 = BEYOND.clamp(-1, 1)[:, None, None].expand(3, 16, 16)
    torch.testing.assert_close(drawn(run, threshold=0.01), near_0, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ((), ("dynamic", "dynamic")),
        (("imagen.dynamic_thresholding_percentile=null",), ("clamp", "clamp")),
        (("unets.1.pred_type=x0", "unets.1.lowres_residual=true"), ("dynamic", "clamp")),
        (("imagen.dynamic_thresholding_percentile=null", "unets.0.pred_type=v",
          'distill={"teacher":"x","steps":[4,null],"cond_scale":2}'), ("none", "clamp")),
    ],
)  # fmt: skip
def test_a_bundle_says_what_is_done_about_them(overrides, wanted):
    stages = parse_config(json.dumps(TINY), overrides=overrides).stages(384)
    assert tuple(map(thresholding, stages)) == wanted


def test_an_export_knows_that_there_is_no_percentile(run):
    constants = sampler_constants(read_inference(inference_path(run, 1)))
    assert constants.dynamic_thresholding_percentile is None
    assert SamplerConstants.model_validate_json(constants.model_dump_json()) == constants
