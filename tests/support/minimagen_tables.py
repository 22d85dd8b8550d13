"""MinImagen's tables of its schedule, and the DDPM posterior that is made of them.

Sampling needs neither: its solvers take their coefficients at the levels they visit.
"""

import torch
from torch import Tensor

from imagen_scale.diffusion.schedule import at_time, linear_betas


def minimagen_tables(timesteps: int) -> dict[str, Tensor]:
    """Every table by MinImagen's name, (T,), computed in float64 and kept in float32."""
    betas = linear_betas(timesteps)
    alphas = 1 - betas
    abar = alphas.cumprod(0)
    abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
    variance = betas * (1 - abar_prev) / (1 - abar)
    tables = {
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
    return {name: values.float() for name, values in tables.items()}


def posterior(
    tables: dict[str, Tensor], x_0: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (B, C, H, W), variance and clipped log variance (B, 1, 1, 1) of q(x_t-1 | x_t, x_0).

    Source: Ho et al. 2020, arXiv:2006.11239, equations 6 and 7.
    """
    mean = (
        at_time(tables["posterior_mean_coef1"], t, x_t) * x_0
        + at_time(tables["posterior_mean_coef2"], t, x_t) * x_t
    )
    variance = at_time(tables["posterior_variance"], t, x_t)
    log_variance = at_time(tables["posterior_log_variance_clipped"], t, x_t)
    return mean, variance, log_variance
