"""Building blocks of the U-Net.

Same functions and same parameter names as MinImagen 0.0.9, so its weights load as they are. What
differs is how they are computed: attention never materialises the N x N matrix, normalisations
are single kernels, and activations stay in one memory layout.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTN_DIM_HEAD = 64
CROSS_ATTN_HEADS = 8  # MinImagen ignores `attn_heads` in cross-attention
SKIP_SCALE = 2**-0.5  # keeps the variance where a skip connection joins


class SinusoidalPosEmb(nn.Module):
    """Times to sines and cosines, (B,) -> (B, dim).

    Computed in float32, since times reach 1000; the caller casts.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        """Embeds times (B,)."""
        half = self.dim // 2
        step = math.log(10000) / (half - 1)
        frequencies = torch.exp(torch.arange(half, device=t.device) * -step)
        angles = t[:, None] * frequencies[None]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class TimeEmbedding(nn.Sequential):
    """Times (B,) to a hidden vector (B, time_cond_dim)."""

    def __init__(self, dim: int, time_cond_dim: int) -> None:
        super().__init__(SinusoidalPosEmb(dim), nn.Linear(dim, time_cond_dim), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        """Embeds in float32, then continues in the precision of the weights."""
        embed, linear, activation = self
        return activation(linear(embed(t).to(linear.weight.dtype)))


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension with a scale only."""

    beta: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))  # never trained, but in MinImagen's files

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (..., dim)."""
        # DeepSpeed's bf16 engine casts parameters but not buffers.
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta.to(x.dtype))


class ChanLayerNorm(nn.Module):
    """Layer normalisation over the channels of an image, with a scale only."""

    memory_format = torch.contiguous_format  # of what it gives

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (B, C, H, W) at each pixel."""
        tokens = x.movedim(1, -1)
        normed = F.layer_norm(tokens, tokens.shape[-1:], self.g.flatten()).movedim(-1, 1)
        return normed.contiguous(memory_format=self.memory_format)


class OverPixels(nn.Module):
    """Applies a token function to an image whose pixels are the tokens."""

    memory_format = torch.contiguous_format  # of what it gives

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H, W)."""
        tokens = x.flatten(2).transpose(1, 2)  # (B, H*W, C)
        out = self.fn(tokens) if context is None else self.fn(tokens, context)
        # Contiguous: a channels-last stride that leaks into the next convolution makes its
        # weight gradient twice as slow on small images, on a CPU.
        image = out.transpose(1, 2).unflatten(2, x.shape[2:])
        return image.contiguous(memory_format=self.memory_format)


class ToOut(nn.Sequential):
    """Attention's last step: back to the width of the features, normalised."""

    def __init__(self, inner: int, dim: int) -> None:
        super().__init__(nn.Linear(inner, dim, bias=False), LayerNorm(dim))


class Attention(nn.Module):
    """Self-attention with several query heads and one shared key/value head."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = ATTN_DIM_HEAD * heads
        self.norm = LayerNorm(dim)
        self.null_kv = nn.Parameter(torch.randn(2, ATTN_DIM_HEAD))
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, ATTN_DIM_HEAD * 2, bias=False)
        self.to_out = ToOut(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attends over (B, N, dim) and a learned null token."""
        q, kv = self.project(x)
        q = q.unflatten(-1, (self.heads, ATTN_DIM_HEAD)).transpose(1, 2)  # (B, h, N, d)
        kv = kv.unflatten(-1, (2, ATTN_DIM_HEAD))  # (B, N, 2, d)
        kv = torch.cat((self.null_kv.expand(x.shape[0], 1, -1, -1), kv), dim=1)
        k, v = kv[:, None].expand(-1, self.heads, -1, -1, -1).unbind(-2)  # (B, h, N+1, d)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalises, then projects to queries (B, N, h*d) and to keys and values (B, N, 2*d)."""
        x = self.norm(x)
        return self.to_q(x), self.to_kv(x)


class CrossAttention(nn.Module):
    """Attention from pixels to the conditioning tokens."""

    def __init__(self, dim: int, *, context_dim: int) -> None:
        super().__init__()
        inner = ATTN_DIM_HEAD * CROSS_ATTN_HEADS
        self.norm = LayerNorm(dim)
        self.null_kv = nn.Parameter(torch.randn(2, ATTN_DIM_HEAD))
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(context_dim, inner * 2, bias=False)
        self.to_out = ToOut(inner, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attends from (B, N, dim) to (B, M, context_dim) and a learned null token."""
        heads = (CROSS_ATTN_HEADS, ATTN_DIM_HEAD)
        q = self.project(x).unflatten(-1, heads).transpose(1, 2)  # (B, h, N, d)
        kv = self.to_kv(context).unflatten(-1, (2, *heads))  # (B, M, 2, h, d)
        null = self.null_kv[None, None, :, None].expand(x.shape[0], 1, -1, CROSS_ATTN_HEADS, -1)
        k, v = torch.cat((null, kv), dim=1).transpose(1, 3).unbind(2)  # (B, h, M+1, d)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def project(self, x: Tensor) -> Tensor:
        """Normalises, then projects to queries (B, N, h*d)."""
        return self.to_q(self.norm(x))


class Residual(nn.Module):
    """Adds a function's output to its input."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Computes fn(x) + x."""
        return self.fn(x) + x


class FeedForward(nn.Sequential):
    """Two 1x1 convolutions with twice the width in between."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            ChanLayerNorm(dim),
            nn.Conv2d(dim, dim * 2, 1, bias=False),
            nn.GELU(),
            ChanLayerNorm(dim * 2),
            nn.Conv2d(dim * 2, dim, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, dim, H, W) to the same shape."""
        return self.contract(self.expand(x))

    def expand(self, x: Tensor) -> Tensor:
        """The first convolution with what comes before it, to (B, 2 * dim, H, W)."""
        norm, conv, *_ = self
        return conv(norm(x))

    def contract(self, x: Tensor) -> Tensor:
        """The second convolution with what comes before it, back to (B, dim, H, W)."""
        *_, activation, norm, conv = self
        return conv(norm(activation(x)))


class TransformerBlock(nn.Module):
    """Self-attention over the pixels, then the feed-forward, each with a residual."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.attn = OverPixels(Attention(dim, heads=heads))
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, dim, H, W) to the same shape."""
        x = self.attn(x) + x
        return self.ff(x) + x


class Block(nn.Module):
    """GroupNorm, optional scale and shift by time, SiLU, 3x3 convolution.

    The skip connection is joined here rather than outside: the joined tensor is then part of what
    checkpointing recomputes instead of a copy that is held.
    """

    def __init__(self, dim: int, dim_out: int, groups: int) -> None:
        super().__init__()
        self.groupnorm = nn.GroupNorm(groups, dim)
        self.activation = nn.SiLU()
        self.project = nn.Conv2d(dim, dim_out, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        scale_shift: tuple[Tensor, Tensor] | None = None,
        *,
        skip: Tensor | None = None,
    ) -> Tensor:
        """Maps (B, dim, H, W) to (B, dim_out, H, W).

        Args:
            x: Features; with `skip`, the first of the `dim` channels.
            scale_shift: Each (B, dim, 1, 1).
            skip: Features of the down path, the remaining channels.
        """
        if skip is not None:
            x = torch.cat((x, skip * SKIP_SCALE), dim=1)
        x = self.groupnorm(x)
        if scale_shift is not None:
            scale, shift = scale_shift
            x = torch.addcmul(shift, x, scale + 1)
        return self.project(self.activation(x))


class ResConv(nn.Conv2d):
    """1x1 convolution of features and, beside them, a skip connection, without joining them."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(dim, dim_out, 1)

    def forward(self, x: Tensor, *, skip: Tensor | None = None) -> Tensor:
        """Maps (B, C, H, W) and (B, dim - C, H, W) to (B, dim_out, H, W)."""
        if skip is None:
            return super().forward(x)
        for_x, for_skip = self.weight.split((x.shape[1], skip.shape[1]), dim=1)
        of_skip = F.conv2d(skip, for_skip)
        return torch.add(F.conv2d(x, for_x, self.bias), of_skip, alpha=SKIP_SCALE)


class ResnetBlock(nn.Module):
    """Residual block conditioned on time and, with `cond_dim`, on tokens by cross-attention."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        time_cond_dim: int,
        groups: int,
        cond_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_cond_dim, dim_out * 2))
        self.cross_attn = (
            OverPixels(CrossAttention(dim_out, context_dim=cond_dim)) if cond_dim else None
        )
        self.block1 = Block(dim, dim_out, groups)
        self.block2 = Block(dim_out, dim_out, groups)
        self.res_conv = ResConv(dim, dim_out) if dim != dim_out else nn.Identity()

    def forward(
        self, x: Tensor, t: Tensor, c: Tensor | None = None, *, skip: Tensor | None = None
    ) -> Tensor:
        """Maps (B, dim, H, W) to (B, dim_out, H, W).

        Args:
            x: Features; with `skip`, the first of the `dim` channels.
            t: Time and pooled text, (B, time_cond_dim).
            c: Conditioning tokens, (B, M, cond_dim); needed when the block has cross-attention.
            skip: Features of the down path, the remaining channels.
        """
        scale_shift = self.time_mlp(t)[:, :, None, None].chunk(2, dim=1)
        joined = {} if skip is None else {"skip": skip}
        h = self.block1(x, **joined)
        if self.cross_attn is not None:
            h = self.cross_attn(h, c) + h
        return self.block2(h, scale_shift) + self.res_conv(x, **joined)


class CrossEmbedLayer(nn.Module):
    """Convolutions of several kernel sizes side by side; half the channels go to the smallest."""

    def __init__(
        self, dim_in: int, dim_out: int, kernel_sizes: tuple[int, ...] = (3, 7, 15)
    ) -> None:
        super().__init__()
        dims = [dim_out // 2**i for i in range(1, len(kernel_sizes))]
        dims.append(dim_out - sum(dims))
        self.convs = nn.ModuleList(
            nn.Conv2d(dim_in, dim, kernel, padding=kernel // 2)
            for kernel, dim in zip(kernel_sizes, dims, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, dim_in, H, W) to (B, dim_out, H, W)."""
        return torch.cat([conv(x) for conv in self.convs], dim=1)


class Parallel(nn.Module):
    """Sum of several functions of the same input."""

    def __init__(self, *fns: nn.Module) -> None:
        super().__init__()
        self.fns = nn.ModuleList(fns)

    def forward(self, x: Tensor) -> Tensor:
        """Sums fn(x) over the functions."""
        return sum(fn(x) for fn in self.fns)


def downsample(dim: int, dim_out: int) -> nn.Module:
    """Halves the side of an image."""
    return nn.Conv2d(dim, dim_out, 4, stride=2, padding=1)


class Upsample(nn.Sequential):
    """Doubles the side of an image."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim, dim_out, 3, padding=1)
        )


def apply_channels_last(unet: nn.Module) -> None:
    """Makes the layers that choose a layout choose channels last; for inputs that have it too.

    Weights stay as they are: ZeRO flattens them, and would make them so again.
    """
    for module in unet.modules():
        if isinstance(module, ChanLayerNorm | OverPixels):
            module.memory_format = torch.channels_last
