"""Discrete variance-preserving noise schedules."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredType = Literal["eps", "v", "x0"]
COSINE_OFFSET = 0.008  # keeps the first times from being noiseless


@dataclass(frozen=True)
class NoiseSchedule:
    """A schedule of T times: q(x_t | x_0) = N(alpha_t x_0, sigma_t² I).

    Time `t` is an integer in [0, T - 1]; T - 1 is the noisiest.

    Args:
        abar: alpha², (T,) in float64: samplers subtract neighbouring values.
        alpha: Scale of the signal, (T,), computed in float64 and kept in float32.
        sigma: Scale of the noise, likewise; alpha² + sigma² = 1.
    """

    abar: Tensor
    alpha: Tensor
    sigma: Tensor

    @classmethod
    def linear(cls, timesteps: int) -> "NoiseSchedule":
        """MinImagen's schedule, that of `linear_betas`.

        Source: Ho et al. 2020, arXiv:2006.11239, equation 4.
        """
        return cls.of_abar((1 - linear_betas(timesteps)).cumprod(0))

    @classmethod
    def cosine(cls, timesteps: int) -> "NoiseSchedule":
        """abar(u) = f(u) / f(0), f(u) = cos²(pi/2 (u + s) / (1 + s)), at u = (t + 1/2) / T.

        Each time stands in the middle of its share of [0, 1], so that abar reaches neither 1 nor 0
        and no beta has to be clipped.

        Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17.
        """
        u = torch.cat(
            (torch.zeros(1), (torch.arange(timesteps, dtype=torch.float64) + 0.5) / timesteps)
        )
        f = ((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * (math.pi / 2)).cos().square()
        return cls.of_abar(f[1:] / f[0])

    @classmethod
    def of_abar(cls, abar: Tensor) -> "NoiseSchedule":
        """The schedule with these alpha², (T,) float64, falling."""
        return cls(abar, abar.sqrt().float(), (1 - abar).sqrt().float())

    def shifted(self, factor: float) -> "NoiseSchedule":
        """The schedule whose SNR is `factor` times this one's at every time.

        Source: Hoogeboom et al. 2023 (simple diffusion), arXiv:2301.11093, section 3.1.
        """
        signal = factor * self.abar
        return self.of_abar(signal / (signal + 1 - self.abar))

    def with_zero_terminal_snr(self) -> "NoiseSchedule":
        """The schedule moved and stretched in alpha so that time T - 1 is noise alone.

        Source: Lin et al. 2023, arXiv:2305.08891, algorithm 1.
        """
        alpha = self.abar.sqrt()
        scaled = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        return self.of_abar(scaled.square())

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same schedule with its tensors on `device`."""
        return NoiseSchedule(self.abar.to(device), self.alpha.to(device), self.sigma.to(device))

    @property
    def timesteps(self) -> int:
        """Number of diffusion steps T."""
        return len(self.abar)

    @property
    def signal(self) -> list[float]:
        """alpha² of each time, as numbers."""
        found: list[float] = self.abar.tolist()
        return found

    @property
    def betas(self) -> Tensor:
        """Variance that each time adds to the one before, 1 - abar_t / abar_{t-1}; (T,) float64."""
        return 1 - self.abar / torch.cat((self.abar.new_ones(1), self.abar[:-1]))

    @property
    def snr(self) -> Tensor:
        """alpha² / sigma² of each time, (T,) float64."""
        return self.abar / (1 - self.abar)

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
        """What a network learns to predict, (B, C, H, W): eps, x_0, or v = alpha eps - sigma x_0.

        Source: Salimans & Ho 2022, arXiv:2202.00512, appendix D.
        """
        if pred_type == "eps":
            return eps
        if pred_type == "x0":
            return x_0
        return at_time(self.alpha, t, x_0) * eps - at_time(self.sigma, t, x_0) * x_0

    def predicted_x_0(
        self, pred_type: PredType, x_t: Tensor, t: Tensor, prediction: Tensor
    ) -> Tensor:
        """The clean images that a prediction implies, (B, C, H, W).

        Of x_0, itself. Of v: x_0 = alpha x_t - sigma v, exact at every time. Of the noise:
        x_0 = (x_t - sigma eps) / alpha, whose error grows as 1 / alpha.
        """
        if pred_type == "x0":
            return prediction
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
