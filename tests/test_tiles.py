"""Tiled denoising: equal to the whole image where it can be, without seams where it cannot."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from imagen_scale.cascade import Stage, Text
from imagen_scale.checkpoint import inference_path, read_inference
from imagen_scale.diffusion.tiles import TiledDenoiser, _weights, tile_starts
from imagen_scale.errors import ShapeError, UsageError
from test_cascade import write_stage

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
    """What is padded at a tile's edge has weight zero; at the image's edge it is the image's own."""
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


def seam(image, borders):
    """Mean jump between neighbouring columns at the borders over that elsewhere."""
    jumps = image.diff(dim=-1).abs().mean(dim=(0, 1))
    at_border = torch.zeros(len(jumps), dtype=torch.bool)
    at_border[[border - 1 for border in borders]] = True
    return (jumps[at_border].mean() / jumps[~at_border].mean()).item()


@torch.no_grad()
def test_a_real_unet_leaves_no_seam(stage):
    """On a smooth picture, where every jump is the tiles' doing; hard tiles do leave one."""
    unet = stage.runtime.unet
    text = unet.condition_text(torch.randn(1, 4, 384), torch.ones(1, 4).bool())
    ramp = torch.linspace(-1, 1, 128).expand(1, 3, 128, 128).contiguous()
    t, none = torch.tensor([10]), torch.tensor([0])

    def denoise(part, t, at):
        return unet.denoise(part, t, text, at.of(ramp).contiguous(), none)

    def bind(window):
        return lambda part, t: denoise(part, t, window)

    blended = TiledDenoiser(bind, tile=32, divisor=stage.divisor)(ramp, t)
    starts = tile_starts(128, 32, stage.divisor)
    borders = [border for start in starts for border in (start, start + 32) if 0 < border < 128]
    hard = torch.cat(
        [
            unet.denoise(part.contiguous(), t, text, part.contiguous(), none)
            for part in ramp[..., :32, :].split(32, dim=-1)
        ],
        dim=-1,
    )
    assert seam(hard, [32, 64, 96]) > 3
    assert seam(blended[..., 8:24, :], borders) < 1.2


def test_upscaling_any_shape(stage):
    picture = torch.rand(3, 23, 41) * 2 - 1
    text = Text(torch.randn(1, 4, 384), torch.ones(1, 4).bool())
    settings = stage_settings(steps=2)
    image = stage.upscale(text, 3, picture, settings)
    assert image.shape == (3, 46, 82)
    assert image.abs().max() <= 1
    assert torch.equal(image, stage.upscale(text, 3, picture, settings))
    assert not torch.equal(image, stage.upscale(text, 4, picture, settings))
    assert stage.upscale(text, 3, picture[:, :5, :9], settings).shape == (3, 10, 18)


def stage_settings(**changes):
    from imagen_scale.cascade import Settings

    return Settings(**changes)


def test_a_tile_that_the_network_cannot_halve_is_refused(stage):
    with pytest.raises(UsageError, match="--tile 31: U-Net 2 takes tiles in multiples of 2 px"):
        Stage(stage.file, stage.device, tile=31)
