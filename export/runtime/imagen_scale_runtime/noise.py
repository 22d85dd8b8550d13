"""The noise that torch draws on the CPU, drawn without it: same seed, same picture.

torch.randn fills float32 arrays of 16 numbers and more from a Mersenne Twister, 24 bits a number,
by the method of Box and Muller over groups of 16: from eight pairs of uniform numbers (u, w), eight
cosines, then eight sines.

Source: `normal_fill` in PyTorch's aten/src/ATen/native/cpu/DistributionTemplates.h.
"""

import math
from collections.abc import Sequence

import numpy as np

GROUP = 16


class NormalNoise:
    """Standard normal pictures, as `torch.Generator().manual_seed(seed)` would give them.

    Args:
        seed: In [0, 2**63); a Mersenne Twister takes its lower 32 bits.
    """

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)

    def draw(self, shape: Sequence[int]) -> np.ndarray:
        """The next picture, of at least 16 numbers, as float32."""
        count = math.prod(shape)
        values = self._uniform(count)
        whole = count - count % GROUP
        values[:whole] = _normal(values[:whole])
        if whole < count:  # torch fills the last 16 anew
            values[-GROUP:] = _normal(self._uniform(GROUP))
        return values.reshape(tuple(shape))

    def _uniform(self, count: int) -> np.ndarray:
        words = self._words.randint(0, 2**32, count, dtype=np.uint32)
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)


def _normal(uniform: np.ndarray) -> np.ndarray:
    groups = uniform.reshape(-1, 2, GROUP // 2)
    radius = np.sqrt(np.float32(-2) * np.log(1 - groups[:, 0]))
    theta = np.float32(2 * math.pi) * groups[:, 1]
    return np.stack((radius * np.cos(theta), radius * np.sin(theta)), axis=1).reshape(-1)
