"""Arithmetic on pictures, (B, C, H, W) float32 in [-1, 1], as the main package does it in torch."""

import math

import numpy as np

CUBIC = -0.5  # of the bicubic kernel, as Pillow and torch's antialiased resize have it


def enlarge(pictures: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic resize with antialiasing, clamped to [-1, 1]."""
    if pictures.shape[-2:] == (height, width):
        return pictures
    down, across = _weights(pictures.shape[-2], height), _weights(pictures.shape[-1], width)
    resized = np.matmul(np.matmul(down, pictures), across.T)
    return np.clip(resized, -1, 1)


def dynamic_threshold(x_0: np.ndarray, percentile: float) -> np.ndarray:
    """Clamps each picture to its own percentile of |x_0| (at least 1) and scales it back.

    Source: Saharia et al. 2022 (Imagen), arXiv:2205.11487, section 2.3.
    """
    flat = np.abs(x_0).reshape(len(x_0), -1)
    s = np.quantile(flat, percentile, axis=1).clip(min=1).astype(np.float32)
    s = s.reshape(-1, *(1,) * (x_0.ndim - 1))
    return np.clip(x_0, -s, s) / s


def to_uint8(pictures: np.ndarray) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] as (B, H, W, C) levels."""
    levels = ((pictures.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))


def _weights(size: int, new_size: int) -> np.ndarray:
    """What each old place counts for each new one, (new_size, size); rows sum to one."""
    scale = size / new_size
    stretch = max(scale, 1.0)  # the kernel grows where pictures shrink
    weights = np.zeros((new_size, size))
    for place in range(new_size):
        centre = (place + 0.5) * scale
        first = max(math.floor(centre - 2 * stretch + 0.5), 0)
        last = min(math.floor(centre + 2 * stretch + 0.5), size)
        row = _cubic((np.arange(first, last) + 0.5 - centre) / stretch)
        weights[place, first:last] = row / row.sum()
    return weights.astype(np.float32)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Source: Keys 1981, equation 15, with a = `CUBIC`."""
    x = np.abs(x)
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = CUBIC * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
