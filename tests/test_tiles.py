"""Tiled denoising: equal to the whole image where it can be, without seams where it cannot."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_cascade import write_stage

from imagen_scale.cascade import Settings, Stage, Text
from imagen_scale.checkpoint import inference_path, read_inference
from imagen_scale.diffusion.tiles import Tile, TiledDenoiser, _weights, tile_starts
from imagen_scale.errors import ShapeError, UsageError

T = torch.tensor([50, 50])


@given(divisor=st.sampled_from([1, 2, 4, 8]), tile=st.integers(1, 20), more=st.integers(0, 100))
def test_tiles_cover_the_image_and_their_weights_sum_to_one(divisor, tile, more):
    side, tile = (tile + more) * divisor, tile * divisor
    starts = tile_starts(side, tile, divisor)
    assert starts[0] == 0
    assert starts[-1] == side - tile
    assert all(start % divisor == 0 for start in starts)
    total = torch.zeros(side).double()
    for start, weight in zip(starts, _weights(starts, tile, side, total), strict=True):
        assert (weight >= 0).all()
        total[start : start + tile] += weight
    torch.testing.assert_close(total, torch.ones(side).double())


def tiled(denoise, x_t, *, tile, divisor=1):
    def bind(window):
        return lambda part, t: denoise(part, t, window)

    return TiledDenoiser(bind, tile=tile, divisor=divisor)(x_t, T)


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
    write_stage(run, 2)
    return Stage(read_inference(inference_path(run, 2)), torch.device("cpu"), tile=32)


def largest_jumps(images, borders):
    """Root mean square jumps between neighbouring columns: largest at a border, and elsewhere."""
    jumps = images.diff(dim=-1).square().mean(dim=(0, 1, 2)).sqrt()
    at_border = torch.zeros(len(jumps), dtype=torch.bool)
    at_border[[border - 1 for border in borders]] = True
    return jumps[at_border].max().item(), jumps[~at_border].max().item()


@torch.no_grad()
def test_a_real_unet_leaves_no_seam(stage):
    """Its receptive field is the whole tile (normalisation), so tiles differ from the whole image.

    A seam is a jump in that difference where a tile ends. Tiles side by side have one.
    """
    torch.manual_seed(0)
    unet, many = stage.runtime.unet, 16
    text = unet.condition_text(torch.randn(many, 4, 384), torch.ones(many, 4).bool())
    lowres = torch.rand(many, 3, 16, 48) * 2 - 1
    lowres = F.interpolate(lowres, scale_factor=4, mode="bicubic").clamp(-1, 1)
    x_t = lowres + 0.3 * torch.randn_like(lowres)
    t, none = torch.full((many,), 10), torch.zeros(many).long()

    def bind(window):
        return lambda part, t: unet.denoise(part, t, text, window.of(lowres).contiguous(), none)

    whole = unet.denoise(x_t, t, text, lowres, none)
    blended = TiledDenoiser(bind, tile=64, divisor=stage.divisor)(x_t, t)
    windows = [Tile(slice(0, 64), slice(start, start + 64)) for start in (0, 64, 128)]
    hard = torch.cat([bind(at)(at.of(x_t).contiguous(), t) for at in windows], dim=-1)
    starts = tile_starts(192, 64, stage.divisor)
    ends = [border for start in starts for border in (start, start + 64) if 0 < border < 192]
    at_hard, elsewhere = largest_jumps(hard - whole, [64, 128])
    print(at_hard, elsewhere)
    assert at_hard > 1.5 * elsewhere
    at_blended, elsewhere = largest_jumps(blended - whole, ends)
    print(at_blended, elsewhere)
    assert at_blended < elsewhere
    assert at_blended < at_hard / 2


def test_upscaling_any_shape(stage):
    picture = torch.rand(3, 23, 41) * 2 - 1
    text = Text(torch.randn(1, 4, 384), torch.ones(1, 4).bool())
    settings = Settings(steps=2)
    image = stage.upscale(text, 3, picture, settings)
    assert image.shape == (3, 46, 82)
    assert image.abs().max() <= 1
    assert torch.equal(image, stage.upscale(text, 3, picture, settings))
    assert not torch.equal(image, stage.upscale(text, 4, picture, settings))
    assert stage.upscale(text, 3, picture[:, :5, :9], settings).shape == (3, 10, 18)


def test_a_tile_that_the_network_cannot_halve_is_refused(stage):
    with pytest.raises(UsageError, match="--tile 31: U-Net 2 takes tiles in multiples of 2 px"):
        Stage(stage.file, stage.device, tile=31)
