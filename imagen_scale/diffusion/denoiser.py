"""What a sampler needs of a network, whatever runtime computes it."""

from typing import Protocol

from torch import Tensor


class Denoiser(Protocol):
    """A prediction of the clean picture with all but the noisy one and the time bound to it.

    Text, guidance scale and the low-resolution image are fixed when a denoiser is made, so a
    sampler works with any network, whatever it was trained to predict, and with any runtime.
    """

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predicts the clean picture: the mean of all that x_t may have been.

        Args:
            x_t: Noisy images, (B, C, H, W) float32.
            t: Times, (B,) int64.

        Returns:
            x_0, (B, C, H, W) float32; not clamped.
        """
        ...
