"""Large images through a denoiser that sees one tile at a time, without seams.

At every step each tile is predicted by itself and the predictions are averaged with smooth
weights, so that there is one noisy image, one thresholding and one solver for the whole picture,
and memory for the network's activations on one tile only.

Source: Bar-Tal et al. 2023 (MultiDiffusion), arXiv:2302.08113, equation 5, with weights that
fall to zero before a tile ends.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..errors import ShapeError
from .names import Array


class Tile(NamedTuple):
    """A window of an image."""

    rows: slice
    columns: slice

    def of(self, images: Array) -> Array:
        """The tile of images (B, C, H, W)."""
        return images[..., self.rows, self.columns]


class TiledDenoiser:
    """A denoiser of whole images from denoisers of tiles.

    Tiles overlap by a quarter of their side or more. The outer quarter of an overlap has weight
    zero, so what a network sees of a tile's edge never shows: where its receptive field is no
    larger than that (a sixteenth of a tile), the result is that of the whole image.

    Args:
        bind: Gives the denoiser of a tile. Asked anew in every step: kept, the conditioning of a
            thousand tiles would fill the memory that tiling saves.
        tile: Side of a tile in pixels, a multiple of `divisor`.
        divisor: Tiles start and end at multiples of it: the network's downsampling.
        of_numpy: Makes an array of the pictures' library from NumPy's, in the pictures' type.
    """

    def __init__(
        self,
        bind: Callable[[Tile], Callable[[Array, Any], Array]],
        *,
        tile: int,
        divisor: int,
        of_numpy: Callable[[np.ndarray], Array],
    ) -> None:
        self.bind, self.tile, self.divisor, self.of_numpy = bind, tile, divisor, of_numpy

    def __call__(self, x_t: Array, t: Any) -> Array:
        """Predicts the clean picture, (B, C, H, W)."""
        height, width = x_t.shape[-2:]
        rows = tile_starts(height, self.tile, self.divisor)
        columns = tile_starts(width, self.tile, self.divisor)
        row_weights = map(self.of_numpy, _weights(rows, self.tile, height))
        column_weights = list(map(self.of_numpy, _weights(columns, self.tile, width)))
        x_0 = 0 * x_t
        for (row, down), (column, across) in itertools.product(
            zip(rows, row_weights, strict=True), zip(columns, column_weights, strict=True)
        ):
            tile = Tile(slice(row, row + self.tile), slice(column, column + self.tile))
            prediction = self.bind(tile)(tile.of(x_t), t)
            x_0[..., tile.rows, tile.columns] += prediction * down[:, None] * across
        return x_0


def tile_starts(side: int, tile: int, divisor: int) -> list[int]:
    """Where tiles of one dimension start: evenly spread, a quarter of a tile or more shared.

    Args:
        side: Of the image, a multiple of `divisor`, not smaller than the tile.
        tile: Side of a tile, a multiple of `divisor`.
        divisor: Starts are multiples of it.

    Raises:
        ShapeError: If the sides do not go together.
    """
    if side < tile or side % divisor or tile % divisor:
        raise ShapeError(
            f"an image side of {side} px in tiles of {tile} px: both must be multiples of "
            f"{divisor} px and the image must not be smaller than a tile."
        )
    units = (side - tile) // divisor  # room between the first start and the last
    stride = max((tile - tile // 4) // divisor, 1)
    gaps = math.ceil(units / stride)
    return [round(i * units / gaps) * divisor for i in range(gaps + 1)] if gaps else [0]


def _weights(starts: list[int], tile: int, side: int) -> list[np.ndarray]:
    """Weights of each tile along one dimension, (tile,); where tiles overlap they sum to one."""
    weights = np.zeros((len(starts), side))
    for weight, start in zip(weights, starts, strict=True):
        weight[start : start + tile] = 1
    for i, (left, right) in enumerate(itertools.pairwise(starts)):
        overlap = left + tile - right
        margin = overlap // 4
        places = (np.arange(overlap) + 0.5 - margin) / (overlap - 2 * margin)
        rising = np.sin(places.clip(0, 1) * math.pi / 2) ** 2
        weights[i + 1, right : right + overlap] *= rising
        weights[i, right : right + overlap] *= 1 - rising
    weights /= weights.sum(0)  # where three tiles overlap
    return [weight[start : start + tile] for weight, start in zip(weights, starts, strict=True)]
