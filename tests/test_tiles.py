"""Tiled denoising: equal to the whole image where it can be, without seams where it cannot."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import write_stage

from imagen_scale.diffusion.tiles import Tile, TiledDenoiser, _weights, tile_starts
from imagen_scale.errors import ShapeError, UsageError
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.options import SamplingOptions, StageSettings
from imagen_scale.sampling.runtimes.contract import Text
from imagen_scale.sampling.stage import Stage
from imagen_scale.sampling.stages import TrainedStages

T = torch.tensor([50, 50])


@given(divisor=st.sampled_from([1, 2, 4, 8]), tile=st.integers(1, 20), more=st.integers(0, 100))
def test_tiles_cover_the_image_and_their_weights_sum_to_one(divisor, tile, more):
    side, tile = (tile + more) * divisor, tile * divisor
    starts = tile_starts(side, tile, divisor)
    assert starts[0] == 0
    assert starts[-1] == side - tile
    assert all(start % divisor == 0 for start in starts)
    total = np.zeros(side)
    for start, weight in zip(starts, _weights(starts, tile, side), strict=True):
        assert (weight >= 0).all()
        total[start : start + tile] += weight
    np.testing.assert_allclose(total, 1)


def tiled(denoise, x_t, *, tile, divisor=1):
    def bind(window):
        return lambda part, t: denoise(part, t, window)

    return TiledDenoiser(bind, tile=tile, divisor=divisor, of_numpy=torch.from_numpy)(x_t, T)


def test_a_pixelwise_denoiser_gives_the_same_in_tiles():
    x_t, lowres = torch.randn(2, 2, 3, 40, 72, dtype=torch.float64).unbind()
    found = tiled(lambda part, t, at: part.sin() * at.of(lowres) + t[0], x_t, tile=16)
    torch.testing.assert_close(found, x_t.sin() * lowres + 50, rtol=0, atol=1e-13)


@pytest.mark.parametrize("reach", [1, 2])
def test_a_convolution_that_reaches_a_sixteenth_of_a_tile_gives_the_same(reach):
    """What is padded at a tile's edge has weight zero; at the image's edge it is its own."""
    torch.manual_seed(0)
    kernel = torch.randn(3, 3, 2 * reach + 1, 2 * reach + 1).double()
    x_t = torch.randn(2, 3, 96, 64).double()

    def convolve(x):
        return F.conv2d(x, kernel, padding=reach)

    found = tiled(lambda part, t, at: convolve(part), x_t, tile=32)
    torch.testing.assert_close(found, convolve(x_t), rtol=0, atol=1e-12)
    # The margin does it: one pixel more of reach, and it shows.
    wide = torch.randn(3, 3, 7, 7).double()
    found = tiled(lambda part, t, at: F.conv2d(part, wide, padding=3), x_t, tile=32)
    assert (found - F.conv2d(x_t, wide, padding=3)).abs().max() > 1e-3


def test_sides_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match="multiples of 4 px"):
        tile_starts(30, 16, 4)
    with pytest.raises(ShapeError, match="not be smaller than a tile"):
        tile_starts(8, 16, 4)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "tiny"
    write_stage(run, 2, noise=0.0)
    return Stage(read_inference(inference_path(run, 2)), torch.device("cpu"), tile=32)


@torch.no_grad()
def test_a_real_unet_leaves_no_seam(stage):
    """On plain pictures, where the only thing to be seen away from the edges is a tile's end.

    A seam is a jump, from one column to the next, of what tiling changes. Tiles put side by side
    have one at every border.
    """
    torch.manual_seed(0)
    unet, many = stage.runtime.unet, 8
    text = unet.condition_text(torch.randn(many, 4, 384), torch.ones(many, 4).bool())
    plain = (torch.rand(many, 3, 1, 1) * 2 - 1).expand(many, 3, 64, 192).contiguous()
    t, none = torch.full((many,), 10), torch.zeros(many).long()

    def bind(window):
        return lambda part, t: unet.denoise(part, t, text, window.of(plain).contiguous(), none)

    def jumps(image):
        change = (image - whole)[..., 16:48, 16:176]
        return change.diff(dim=-1).square().mean(dim=(0, 1, 2)).sqrt()

    whole = unet.denoise(plain, t, text, plain, none)
    windows = [Tile(slice(0, 64), slice(start, start + 64)) for start in (0, 64, 128)]
    hard = jumps(torch.cat([bind(at)(at.of(plain).contiguous(), t) for at in windows], dim=-1))
    blended = jumps(
        TiledDenoiser(
            bind, tile=64, divisor=stage.divisor, of_numpy=lambda w: torch.from_numpy(w).float()
        )(plain, t)
    )
    assert hard.max() > 10 * hard.median()
    assert blended.max() < hard.max() / 10


def test_upscaling_any_shape(stage):
    picture = torch.rand(3, 23, 41) * 2 - 1
    text = Text(torch.randn(1, 4, 384), torch.ones(1, 4).bool())
    settings = StageSettings(steps=2)
    image = stage.upscale(picture, text, 3, settings)
    assert image.shape == (3, 46, 82)
    assert image.abs().max() <= 1
    assert torch.equal(image, stage.upscale(picture, text, 3, settings))
    assert not torch.equal(image, stage.upscale(picture, text, 4, settings))
    assert stage.upscale(picture[:, :5, :9], text, 3, settings).shape == (3, 10, 18)


def test_a_tile_is_refused_before_the_stages_before_are_drawn(stage):
    file = stage.file
    cascade = TrainedStages([file, file])  # any two
    for tile, said in ((31, "tile 31: U-Net 2 takes tiles in"), (30, None), (33, None)):
        options = SamplingOptions(tile=tile)
        if said is None:
            cascade.settings(options)
        else:
            with pytest.raises(UsageError, match=said):
                cascade.settings(options)


def test_a_tile_that_the_network_cannot_halve_is_refused(stage):
    with pytest.raises(UsageError, match="tile 31: U-Net 2 takes tiles in multiples of 2 px"):
        Stage(stage.file, stage.device, tile=31)
