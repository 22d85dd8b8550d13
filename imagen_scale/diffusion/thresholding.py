"""Thresholding of the predicted clean image."""

import math

from torch import Tensor

# Up to this share of the values, sorting them alone is faster than selecting twice from all.
TOP_SHARE = 0.01


def dynamic_threshold(x_0: Tensor, percentile: float) -> Tensor:
    """Clamps each image to its own percentile of |x_0| (at least 1) and scales it back to [-1, 1].

    Args:
        x_0: Predicted clean images, (B, C, H, W).
        percentile: In (0, 1]; the values above it are clamped.

    Source: Saharia et al. 2022 (Imagen), arXiv:2205.11487, section 2.3.
    """
    s = abs_quantile(x_0, percentile).clamp(min=1).reshape(-1, *(1,) * (x_0.ndim - 1))
    return x_0.clamp(-s, s) / s


def into_range(x_0: Tensor, percentile: float | None) -> Tensor:
    """Predicted clean images in [-1, 1]: scaled by a percentile, or cut off where it is None."""
    return x_0.clamp(-1, 1) if percentile is None else dynamic_threshold(x_0, percentile)


def abs_quantile(x: Tensor, q: float) -> Tensor:
    """Per-image quantile of |x| with linear interpolation, (B,).

    `torch.quantile` refuses more than 2**24 elements (six images of 1024 px) and sorts them all;
    two order statistics give the same number.
    """
    values = x.abs().flatten(1)
    place = q * (values.shape[1] - 1)
    low = math.floor(place)
    above = values.shape[1] - low  # how many are not below the lower one
    if above <= TOP_SHARE * values.shape[1] and above > 1:
        top = values.topk(above, dim=1).values
        return top[:, -1].lerp(top[:, -2], place - low)
    lower = values.kthvalue(low + 1, dim=1).values
    if low == place:
        return lower
    upper = values.kthvalue(low + 2, dim=1).values
    return lower.lerp(upper, place - low)
