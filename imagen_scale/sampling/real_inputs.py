"""Real pictures and what a stage by itself makes them from."""

from collections.abc import Sequence

from torch import Tensor

from imagen_scale.config import StageConfig
from imagen_scale.data.prepared import Prepared, real_pictures
from imagen_scale.diffusion.lowres import resize
from imagen_scale.sampling.runtimes.contract import Text
from imagen_scale.sampling.stage import Inputs


def real_inputs(
    prepared: Prepared, indices: Sequence[int], stage: StageConfig, text: Text, seed: int
) -> tuple[Inputs, Tensor]:
    """Inputs of a stage, for super-resolution real pictures made small, and the pictures.

    Args:
        prepared: The pictures.
        indices: N of them.
        stage: The stage.
        text: Their captions, encoded.
        seed: Of the first; the i-th has seed + i.

    Returns:
        The inputs, and the real pictures (N, 3, size, size) in [-1, 1].
    """
    real = real_pictures(prepared, indices, stage.size)
    lowres = None if stage.small_size is None else resize(real, stage.small_size)
    return Inputs(text, range(seed, seed + len(indices)), lowres), real
