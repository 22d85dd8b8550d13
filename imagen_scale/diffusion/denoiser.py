"""What a sampler needs of a network, whatever runtime computes it."""

from typing import Protocol

from torch import Tensor


class Denoiser(Protocol):
    """A noise prediction with everything but the noisy image and the time bound to it.

    Text, guidance scale and the low-resolution image are fixed when a denoiser is made, so a
    sampler works with any network and any runtime.
    """

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predicts the noise.

        Args:
            x_t: Noisy images, (B, C, H, W) float32.
            t: Times, (B,) int64.

        Returns:
            eps, (B, C, H, W) float32.
        """
        ...
