"""Guidance in a share of the steps: which, what the others cost, and in every runtime the same."""

import numpy as np
import pytest
import torch

from imagen_scale.diffusion.guidance import guided_times
from imagen_scale.errors import UsageError
from imagen_scale.files.pictures import to_uint8
from imagen_scale.models.unet import UNet
from imagen_scale.sampling.groups import stream_groups
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stage import Listener
from imagen_scale.sampling.stages import TrainedStages
from imagen_scale.sampling.wanted import Wanted

make = SamplingOptions.make


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ("0:1", {90, 60, 30, 0}),
        ("0.25:1", {60, 30, 0}),
        ("0.2:0.5", {60}),
        (".5:.75", {30}),
        ("0:0.01", {90}),
        ("0.9:1", set()),  # the last of four steps begins at three quarters
    ],
)
def test_steps_are_counted_from_noise_and_the_end_is_left_out(interval, expected):
    assert guided_times([90, 60, 30, 0], interval) == expected


@pytest.mark.parametrize(
    "wrong", ["0.5", "1:0", "0.5:0.5", "-0.1:1", "0:1.1", "a:b", "0:1:2", "nan:1"]
)
def test_what_is_no_interval_is_said(run, wrong):
    with pytest.raises(UsageError, match=f"guidance_interval {wrong}: it should be FROM:UNTIL"):
        TrainedStages.load(run).settings(make(guidance_interval=wrong))


def sample(run, runtime="torch", **options):
    cascade = TrainedStages.load(run, runtime=RuntimeOptions(runtime=runtime))
    return cascade.sample(["sun"], make(**{"steps": 4, "cond_scale": [4.0, 2.0]} | options))


@pytest.fixture
def computed(monkeypatch):
    """Images that went through a network, of each call."""
    counts, denoise = [], UNet.denoise

    def counted(self, x_t, *others):
        counts.append(len(x_t))
        return denoise(self, x_t, *others)

    monkeypatch.setattr(UNet, "denoise", counted)
    return counts


def test_the_other_steps_take_half_the_work(run, computed):
    whole, wholly = sample(run), list(computed)
    assert wholly == [2] * 8
    computed.clear()
    part = sample(run, guidance_interval=["0.5:1", "0:0.25"])
    assert computed == [1, 1, 2, 2, 2, 1, 1, 1]
    assert not torch.equal(part[0], whole[0]) and not torch.equal(part[1], whole[1])
    assert all(map(torch.equal, sample(run, guidance_interval="0:1"), whole))


def test_an_interval_without_a_step_is_no_guidance(run, computed):
    found = sample(run, guidance_interval="0.9:1")
    assert computed == [1] * 8
    assert all(map(torch.equal, found, sample(run, cond_scale=[1.0, 1.0])))


@pytest.mark.parametrize("sampler", ["heun", "ddpm"])
def test_an_export_does_the_same(exported, sampler):
    options = {"guidance_interval": "0.3:0.8", "sampler": sampler}
    theirs, ours = (sample(exported, name, **options) for name in ("torch", "onnx"))
    for one, other in zip(theirs, ours, strict=True):
        assert np.abs(to_uint8(one).astype(int) - to_uint8(other)).max() <= 1


def test_pictures_of_different_guidance_stay_what_they_are_alone(run):
    """Guidance that is 0 stays 0 where it does not act, and what is above 1 becomes 1."""
    cascade, options = TrainedStages.load(run), make(steps=4, guidance_interval="0.5:1")
    wanted = [Wanted("sun", 0, (scale, 1.0)) for scale in (0.0, 1.0, 5.0)]
    together = stream_groups(cascade, wanted, cascade.settings(options), options, Listener())
    for picture, one in zip(list(together), wanted, strict=True):
        scales = list(one.cond_scales)
        (alone,) = cascade.stream(["sun"], options.changed(cond_scale=scales))
        torch.testing.assert_close(picture.stages[-1], alone.stages[-1], atol=1e-4, rtol=0)
