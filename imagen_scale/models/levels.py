"""The levels of a U-Net's convolutional path, in MinImagen's order of parameters.

- down: [downsample before], block with text, blocks, attention, [downsample after]
- up:   block with text, blocks, attention, upsample
"""

from itertools import pairwise

from torch import nn

from imagen_scale.config import Network
from imagen_scale.config.network import NORM_GROUPS
from imagen_scale.models.layers import (
    Parallel,
    ResnetBlock,
    TransformerBlock,
    Upsample,
    downsample,
)


class Levels:
    """Makes what one network's path consists of.

    Args:
        network: The network. Its levels are numbered from the finest, 0.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        dims = [network.dim, *(network.dim * mult for mult in network.dim_mults)]
        self.dims = list(pairwise(dims))  # channels in and out

    def block(self, dim_in: int, dim_out: int, *, cross: bool) -> ResnetBlock:
        """A residual block; with `cross` its pixels attend to text and time."""
        network = self.network
        return ResnetBlock(
            dim_in,
            dim_out,
            time_cond_dim=network.time_cond_dim,
            groups=NORM_GROUPS,
            cond_dim=network.cond_dim if cross else None,
        )

    def down(self, level: int) -> nn.ModuleList:
        """A level on the way to the coarsest."""
        dim_in, dim_out = self.dims[level]
        width, cross = self.skip_dim(level), self.network.layer_cross_attns[level]
        before: nn.Module | None = None
        after: nn.Module | None = None
        if self.network.memory_efficient:
            before = downsample(dim_in, dim_out)
        elif level < len(self.dims) - 1:
            after = downsample(dim_in, dim_out)
        else:
            after = Parallel(
                nn.Conv2d(dim_in, dim_out, 3, padding=1), nn.Conv2d(dim_in, dim_out, 1)
            )
        blocks = self._blocks(level, width, width)
        first = self.block(width, width, cross=cross)
        parts = [before, first, blocks, self._attention(level, width), after]
        return nn.ModuleList(parts)  # type: ignore[arg-type]  # None keeps numbering

    def up(self, level: int) -> nn.ModuleList:
        """A level on the way back."""
        dim_in, dim_out = self.dims[level]
        joined = dim_out + self.skip_dim(level)
        blocks = self._blocks(level, joined, dim_out)
        grows = level > 0 or self.network.memory_efficient
        grow = Upsample(dim_out, dim_in) if grows else nn.Identity()
        first = self.block(joined, dim_out, cross=self.network.layer_cross_attns[level])
        return nn.ModuleList([first, blocks, self._attention(level, dim_out), grow])

    def skip_dim(self, level: int) -> int:
        """Channels that a level passes over to its counterpart."""
        dim_in, dim_out = self.dims[level]
        return dim_out if self.network.memory_efficient else dim_in

    def _blocks(self, level: int, dim_in: int, dim_out: int) -> nn.ModuleList:
        number = self.network.num_resnet_blocks[level]
        return nn.ModuleList(self.block(dim_in, dim_out, cross=False) for _ in range(number))

    def _attention(self, level: int, dim: int) -> nn.Module:
        if not self.network.layer_attns[level]:
            return nn.Identity()
        return TransformerBlock(dim, heads=self.network.attn_heads)
