"""The discrete variance-preserving noise schedule."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredType = Literal["eps", "v"]


@dataclass(frozen=True)
class NoiseSchedule:
    """MinImagen's linear schedule: q(x_t | x_0) = N(alpha_t x_0, sigma_t² I).

    Time `t` is an integer in [0, T - 1]; T - 1 is the noisiest.

    Args:
        abar: alpha², (T,) in float64: samplers subtract neighbouring values.
        alpha: Scale of the signal, (T,), computed in float64 and kept in float32.
        sigma: Scale of the noise, likewise; alpha² + sigma² = 1.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 4.
    """

    abar: Tensor
    alpha: Tensor
    sigma: Tensor

    @classmethod
    def linear(cls, timesteps: int) -> "NoiseSchedule":
        """The schedule of `linear_betas`."""
        abar = (1 - linear_betas(timesteps)).cumprod(0)
        return cls(abar, abar.sqrt().float(), (1 - abar).sqrt().float())

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same schedule with its tensors on `device`."""
        return NoiseSchedule(self.abar.to(device), self.alpha.to(device), self.sigma.to(device))

    @property
    def timesteps(self) -> int:
        """Number of diffusion steps T."""
        return len(self.abar)

    def level_to_time(self, level: float) -> int:
        """Time of a noise level in [0, 1), as MinImagen counts it: floor(T * level)."""
        return int(self.timesteps * level)

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Adds noise: x_t = alpha x_0 + sigma eps.

        Args:
            x_0: Clean images, (B, C, H, W).
            t: Times, (B,) int64.
            eps: Standard normal noise, (B, C, H, W).
        """
        return at_time(self.alpha, t, x_0) * x_0 + at_time(self.sigma, t, x_0) * eps

    def target(self, pred_type: PredType, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What a network learns to predict, (B, C, H, W): eps, or v = alpha eps - sigma x_0.

        Source: Salimans & Ho 2022, arXiv:2202.00512, appendix D.
        """
        if pred_type == "eps":
            return eps
        return at_time(self.alpha, t, x_0) * eps - at_time(self.sigma, t, x_0) * x_0

    def predicted_x_0(
        self, pred_type: PredType, x_t: Tensor, t: Tensor, prediction: Tensor
    ) -> Tensor:
        """The clean images that a prediction implies, (B, C, H, W).

        Of v: x_0 = alpha x_t - sigma v, exact at every time. Of the noise:
        x_0 = (x_t - sigma eps) / alpha, whose error grows as 1 / alpha.
        """
        alpha, sigma = at_time(self.alpha, t, x_t), at_time(self.sigma, t, x_t)
        if pred_type == "v":
            return alpha * x_t - sigma * prediction
        return (x_t - sigma * prediction) / alpha


def linear_betas(timesteps: int) -> Tensor:
    """Betas from 1e-4 to 0.02 at T = 1000, scaled by 1000 / T for other T; (T,) float64."""
    scale = 1000 / timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)


def at_time(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """values[t] as (B, 1, ...) with as many dimensions as `like`."""
    return values[t].reshape(-1, *(1,) * (like.ndim - 1))
