"""The discrete variance-preserving noise schedule."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """MinImagen's linear schedule: q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I).

    All tensors are (T,), computed in float64 and kept in float32, but for `abar`, which stays
    in float64: samplers subtract neighbouring values. Time `t` is an integer in [0, T - 1];
    T - 1 is the noisiest.

    Source: Ho et al. 2020, arXiv:2006.11239, equations 4, 6 and 7.
    """

    abar: Tensor
    betas: Tensor
    alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor

    @classmethod
    def linear(cls, timesteps: int) -> "NoiseSchedule":
        """Betas from 1e-4 to 0.02 at T = 1000, scaled by 1000 / T for other T."""
        scale = 1000 / timesteps
        betas = torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)
        alphas = 1 - betas
        abar = alphas.cumprod(0)
        abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
        variance = betas * (1 - abar_prev) / (1 - abar)
        values = {
            "betas": betas,
            "alphas_cumprod": abar,
            "posterior_variance": variance,
            # The variance is zero at t = 0.
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": betas * abar_prev.sqrt() / (1 - abar),
            "posterior_mean_coef2": (1 - abar_prev) * alphas.sqrt() / (1 - abar),
            "sqrt_alphas_cumprod": abar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
            "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        }
        return cls(abar=abar, **{name: value.float() for name, value in values.items()})

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same schedule with its tensors on `device`."""
        return NoiseSchedule(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @property
    def timesteps(self) -> int:
        """Number of diffusion steps T."""
        return len(self.betas)

    def level_to_time(self, level: float) -> int:
        """Time of a noise level in [0, 1), as MinImagen counts it: floor(T * level)."""
        return int(self.timesteps * level)

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Adds noise: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

        Args:
            x_0: Clean images, (B, C, H, W).
            t: Times, (B,) int64.
            eps: Standard normal noise, (B, C, H, W).
        """
        alpha = at_time(self.sqrt_alphas_cumprod, t, x_0)
        sigma = at_time(self.sqrt_one_minus_alphas_cumprod, t, x_0)
        return alpha * x_0 + sigma * eps

    def eps_to_x0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Recovers the clean image from a noise prediction: (x_t - sigma eps) / alpha."""
        recip = at_time(self.sqrt_recip_alphas_cumprod, t, x_t)
        recipm1 = at_time(self.sqrt_recipm1_alphas_cumprod, t, x_t)
        return recip * x_t - recipm1 * eps

    def v_target(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What a v-predicting network learns: v = alpha eps - sigma x_0, (B, C, H, W).

        Source: Salimans & Ho 2022, arXiv:2202.00512, appendix D.
        """
        alpha = at_time(self.sqrt_alphas_cumprod, t, x_0)
        sigma = at_time(self.sqrt_one_minus_alphas_cumprod, t, x_0)
        return alpha * eps - sigma * x_0

    def v_to_eps(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """The noise that a v prediction implies: eps = alpha v + sigma x_t."""
        alpha = at_time(self.sqrt_alphas_cumprod, t, x_t)
        sigma = at_time(self.sqrt_one_minus_alphas_cumprod, t, x_t)
        return alpha * v + sigma * x_t

    def posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_t-1 | x_t, x_0).

        The mean is (B, C, H, W), the others (B, 1, 1, 1).
        """
        mean = (
            at_time(self.posterior_mean_coef1, t, x_t) * x_0
            + at_time(self.posterior_mean_coef2, t, x_t) * x_t
        )
        variance = at_time(self.posterior_variance, t, x_t)
        log_variance = at_time(self.posterior_log_variance_clipped, t, x_t)
        return mean, variance, log_variance


def at_time(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """values[t] as (B, 1, ...) with as many dimensions as `like`."""
    return values[t].reshape(-1, *(1,) * (like.ndim - 1))
