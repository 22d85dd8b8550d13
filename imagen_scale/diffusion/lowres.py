"""The low-resolution image that a super-resolution stage is conditioned on."""

import torch.nn.functional as F
from torch import Tensor


def resize(images: Tensor, size: int) -> Tensor:
    """Bicubic resize of squares with antialiasing, clamped to [-1, 1].

    Args:
        images: (B, C, H, H) in [-1, 1].
        size: New side in pixels.
    """
    return enlarge(images, size, size)


def enlarge(images: Tensor, height: int, width: int) -> Tensor:
    """`resize` to any shape."""
    if images.shape[-2:] == (height, width):
        return images
    resized = F.interpolate(
        images.float(), size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return resized.clamp(-1, 1)


def shrink_and_enlarge(images: Tensor, small_size: int) -> Tensor:
    """What the smaller stage would have given, enlarged back to the size of `images`.

    Used in training, where the smaller stage's output is not at hand. The result is in [-1, 1]
    before noise is added, as in sampling.
    """
    return resize(resize(images, small_size), images.shape[-1])
