"""Measures of pictures that need no trained network."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_scale.diffusion.lowres import resize

SSIM_WINDOW = 11  # pixels, with a standard deviation of 1.5, as in the paper
SSIM_SIGMA = 1.5


def retrieval_accuracy(generated: Tensor, real: Tensor, size: int) -> float:
    """Share of generated pictures whose nearest real picture is the prompted one.

    Nearest by L2 distance on RGB, both downsampled to `size`.

    Args:
        generated: (N, 3, H, W) in [-1, 1]; the i-th was made from the caption of real[i].
        real: (N, 3, h, w) in [-1, 1].
        size: Side of the compared pictures in pixels.
    """
    distances = torch.cdist(resize(generated, size).flatten(1), resize(real, size).flatten(1))
    return (distances.argmin(dim=1) == torch.arange(len(real))).float().mean().item()


def psnr_db(images: Tensor, real: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, (N,); both in [-1, 1].

    Infinite where the pictures are equal.
    """
    error = ((images - real) / 2).square().flatten(1).mean(1)
    return -10 * error.log10()


def ssim(images: Tensor, real: Tensor) -> Tensor:
    """Structural similarity of each picture, (N,) in [-1, 1], 1 where they are equal.

    Mean over the places where the whole Gaussian window of 11 pixels fits, and over the colours.
    Pictures smaller than the window take the largest odd one that fits.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        real: The same shape and range.

    Source: Wang, Bovik, Sheikh & Simoncelli 2004, doi:10.1109/TIP.2003.819861, section III.B.
    """
    # One at a time: what is held in between is twenty times a picture.
    pairs = zip(images.split(1), real.split(1), strict=True)
    return torch.cat([_ssim_of_one(*pair) for pair in pairs])


def _ssim_of_one(image: Tensor, real: Tensor) -> Tensor:
    channels, side = image.shape[1], min(*image.shape[-2:], SSIM_WINDOW)
    side -= 1 - side % 2
    offsets = torch.arange(side, dtype=torch.float64) - side // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()
    window = torch.outer(weights, weights).expand(channels, 1, side, side)

    def local(values: Tensor) -> Tensor:
        return F.conv2d(values, window, groups=channels)

    # In double precision: a variance is a small difference of large numbers.
    x, y = ((pictures.double() + 1) / 2 for pictures in (image, real))
    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(1).float()


def root_mean_square(images: Tensor, others: Tensor) -> Tensor:
    """Of the difference of each pair over its pixels, (N,), levels 0 to 1; both in [-1, 1]."""
    return ((images - others) / 2).square().flatten(1).mean(1).sqrt()


def nearest_distance(images: Tensor, among: Tensor) -> Tensor:
    """Root mean square distance from each picture to the nearest of others, (N,), levels 0 to 1.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        among: (M, 3, H, W) in [-1, 1].
    """
    flat, others = images.flatten(1), among.flatten(1)
    return torch.cdist(flat, others).min(1).values / (2 * math.sqrt(flat.shape[1]))


def lowres_consistency_db(images: Tensor, lowres: Tensor) -> Tensor:
    """PSNR between super-resolved pictures, shrunk again, and what they were made from, (N,).

    Args:
        images: (N, 3, H, W) in [-1, 1].
        lowres: (N, 3, h, w) in [-1, 1], h below H.
    """
    return psnr_db(resize(images, lowres.shape[-1]), lowres)


class Colour(NamedTuple):
    """Mean and standard deviation of each colour over all pixels, on levels of 0 to 1."""

    mean: list[float]  # red, green, blue
    std: list[float]


class ColourTally:
    """Adds pictures up to their `Colour` without keeping them."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = torch.zeros(3, dtype=torch.float64)
        self._squares = torch.zeros(3, dtype=torch.float64)

    def add(self, images: Tensor) -> None:
        """Takes pictures, (N, 3, H, W) in [-1, 1]."""
        for image in images:  # one at a time in double precision
            levels = (image.double() + 1) / 2
            self._count += levels[0].numel()
            self._sum += levels.sum((1, 2))
            self._squares += levels.square().sum((1, 2))

    def colour(self) -> Colour:
        """Of all pictures so far, one at least."""
        mean = self._sum / self._count
        std = (self._squares / self._count - mean**2).clamp(min=0).sqrt()
        return Colour(mean.tolist(), std.tolist())


def drift(generated: list[float], real: list[float]) -> float:
    """The difference that is largest without its sign, with it; colour by colour."""
    return max((g - r for g, r in zip(generated, real, strict=True)), key=abs)
