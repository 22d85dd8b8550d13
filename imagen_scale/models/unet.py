"""The U-Net of MinImagen: same function, same parameter names, less memory and time."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_scale.config import Network
from imagen_scale.errors import ShapeError
from imagen_scale.models.layers import (
    Attention,
    CrossEmbedLayer,
    OverPixels,
    Residual,
    TimeEmbedding,
)
from imagen_scale.models.levels import Levels

NUM_TIME_TOKENS = 2


class TextCond(NamedTuple):
    """All that depends on the text but not on the noise level: computed once per prompt."""

    tokens: Tensor  # (B, max_text_len, cond_dim), projected and normalised
    hidden: Tensor  # (B, time_cond_dim), pooled


class UNet(nn.Module):
    """Predicts noise, v or x_0 from x_t, time, text and, for super-resolution, a small image.

    Args:
        config: What to build (`StageConfig.network`).

    Source: Saharia et al. 2022 (Imagen), arXiv:2205.11487; network as MinImagen 0.0.9's `Unet`.
    """

    def __init__(self, config: Network) -> None:
        super().__init__()
        self.config = config
        dim, cond_dim, lowres_cond = config.dim, config.cond_dim, config.lowres_cond
        time_cond_dim = config.time_cond_dim

        # Time conditioning.
        self.to_time_hiddens = TimeEmbedding(dim, time_cond_dim)
        self.to_time_cond = nn.Sequential(nn.Linear(time_cond_dim, time_cond_dim))
        self.to_time_tokens = nn.Sequential(
            nn.Linear(time_cond_dim, cond_dim * NUM_TIME_TOKENS),
            nn.Unflatten(1, (NUM_TIME_TOKENS, cond_dim)),
        )
        if lowres_cond:  # the noise level of the low-resolution image, likewise
            self.to_lowres_time_hiddens = TimeEmbedding(dim, time_cond_dim)
            self.to_lowres_time_cond = nn.Sequential(nn.Linear(time_cond_dim, time_cond_dim))
            self.to_lowres_time_tokens = nn.Sequential(
                nn.Linear(time_cond_dim, cond_dim * NUM_TIME_TOKENS),
                nn.Unflatten(1, (NUM_TIME_TOKENS, cond_dim)),
            )

        # Text conditioning.
        self.norm_cond = nn.LayerNorm(cond_dim)
        self.text_to_cond = nn.Linear(config.text_embed_dim, cond_dim)
        self.null_text_embed = nn.Parameter(torch.randn(1, config.max_text_len, cond_dim))
        self.null_text_hidden = nn.Parameter(torch.randn(1, time_cond_dim))
        self.to_text_non_attn_cond = nn.Sequential(
            nn.LayerNorm(cond_dim),
            nn.Linear(cond_dim, time_cond_dim),
            nn.SiLU(),
            nn.Linear(time_cond_dim, time_cond_dim),
        )

        levels = Levels(config)
        coarsest, numbers = levels.dims[-1][1], range(config.num_levels)
        self.init_conv = CrossEmbedLayer(config.channels * (2 if lowres_cond else 1), dim)
        self.downs = nn.ModuleList()
        self.ups = nn.ModuleList()
        self.downs.extend(levels.down(level) for level in numbers)
        self.mid_block1 = levels.block(coarsest, coarsest, cross=True)
        self.mid_attn = (
            OverPixels(Residual(Attention(coarsest, heads=config.attn_heads)))
            if config.attend_at_middle
            else None
        )
        self.mid_block2 = levels.block(coarsest, coarsest, cross=True)
        self.ups.extend(levels.up(level) for level in reversed(numbers))
        self.final_res_block = levels.block(dim, dim, cross=False)
        self.final_conv = nn.Conv2d(dim, config.channels_out, 3, padding=1)

    def begin_with_zero(self) -> None:
        """Makes the prediction zero, until its last layer is trained."""
        nn.init.zeros_(self.final_conv.weight)
        assert self.final_conv.bias is not None
        nn.init.zeros_(self.final_conv.bias)

    def condition_text(
        self, text_embeds: Tensor, text_mask: Tensor, keep_mask: Tensor | None = None
    ) -> TextCond:
        """The part that depends on the text alone.

        Captions shorter than `max_text_len` are filled with learned null tokens (which are
        attended to); longer ones are cut, text and mask together.

        Args:
            text_embeds: Encoder features, (B, L, text_embed_dim).
            text_mask: True at real tokens, (B, L) bool.
            keep_mask: False where the caption is dropped for classifier-free guidance, (B,)
                bool; None keeps all.
        """
        if text_embeds.ndim != 3 or text_embeds.shape[2] != self.config.text_embed_dim:
            raise ShapeError(
                f"text_embeds has shape {tuple(text_embeds.shape)}; this U-Net takes "
                f"(batch, tokens, {self.config.text_embed_dim})."
            )
        max_len = self.config.max_text_len
        text_embeds, text_mask = text_embeds[:, :max_len], text_mask[:, :max_len]
        missing = max_len - text_embeds.shape[1]
        projection = self.text_to_cond
        tokens = F.pad(projection(text_embeds.to(projection.weight.dtype)), (0, 0, 0, missing))
        mask = F.pad(text_mask, (0, missing))
        if keep_mask is not None:
            mask = mask & keep_mask[:, None]
        tokens = torch.where(mask[:, :, None], tokens, self.null_text_embed)
        hidden = self.to_text_non_attn_cond(tokens.mean(dim=1))
        if keep_mask is not None:
            hidden = torch.where(keep_mask[:, None], hidden, self.null_text_hidden)
        return TextCond(self.norm_cond(tokens), hidden)

    def null_text(self, batch: int) -> TextCond:
        """What `condition_text` gives when every caption is dropped."""
        tokens = self.norm_cond(self.null_text_embed)
        return TextCond(tokens.expand(batch, -1, -1), self.null_text_hidden.expand(batch, -1))

    def denoise(
        self, x_t: Tensor, t: Tensor, text: TextCond,
        lowres_img: Tensor | None = None, lowres_t: Tensor | None = None,
        *, deep: Tensor | None = None, kept: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """The part that depends on the noise level.

        Args:
            x_t: Noisy images, (B, C, H, W).
            t: Times, (B,).
            text: From `condition_text` or `null_text`.
            lowres_img: Low-resolution images enlarged to (B, C, H, W) and noised;
                super-resolution only.
            lowres_t: Their noise times, (B,); super-resolution only.
            deep: What the finest level takes from those below it, which are left out then:
                `kept` of another evaluation.
            kept: Is given that of this one, (B, D, h, w), at the finest level's side.

        Returns:
            What `pred_type` says, (B, C, H, W).
        """
        time_hidden = self.to_time_hiddens(t)
        cond = self.to_time_cond(time_hidden) + text.hidden
        time_tokens = self.to_time_tokens(time_hidden)
        if self.config.lowres_cond:
            if lowres_img is None or lowres_t is None:
                raise ShapeError("a super-resolution U-Net needs lowres_img and lowres_t.")
            lowres_hidden = self.to_lowres_time_hiddens(lowres_t)
            cond = cond + self.to_lowres_time_cond(lowres_hidden)
            time_tokens = torch.cat((time_tokens, self.to_lowres_time_tokens(lowres_hidden)), dim=1)
            x_t = torch.cat((x_t, lowres_img), dim=1)
        # The norm acts on each token by itself, so the text's share is already done.
        tokens = torch.cat((self.norm_cond(time_tokens), text.tokens), dim=1)

        x = self.init_conv(x_t.to(self.final_conv.weight.dtype))
        skips = []
        levels: Any = self.downs  # ModuleList is not typed by its entries
        for before, first, blocks, attention, after in levels:
            if before is not None:
                x = before(x)
            x = first(x, cond, tokens)
            for block in blocks:
                x = block(x, cond)
                skips.append(x)
            x = attention(x)
            skips.append(x)
            if deep is not None:
                break
            if after is not None:
                x = after(x)

        levels = self.ups
        if deep is None:
            x = self.mid_block1(x, cond, tokens)
            if self.mid_attn is not None:
                x = self.mid_attn(x)
            x = self.mid_block2(x, cond, tokens)
        else:
            x, levels = deep, levels[-1:]
        for first, blocks, attention, grow in levels:
            if kept is not None:
                kept[:] = [x]  # the last level's stays
            x = first(x, cond, tokens, skip=skips.pop())
            for block in blocks:
                x = block(x, cond, skip=skips.pop())
            x = grow(attention(x))

        return self.final_conv(self.final_res_block(x, cond))

    def denoise_cached(
        self, x_t: Tensor, t: Tensor, text: TextCond,
        lowres_img: Tensor | None = None, lowres_t: Tensor | None = None,
        deep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What `denoise` gives and what it keeps, (B, D, h, w)."""
        kept: list[Tensor] = []
        made = self.denoise(x_t, t, text, lowres_img, lowres_t, deep=deep, kept=kept)
        return made, kept[0]

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        text_embeds: Tensor,
        text_mask: Tensor,
        keep_mask: Tensor | None = None,
        lowres_img: Tensor | None = None,
        lowres_t: Tensor | None = None,
    ) -> Tensor:
        """What `denoise` gives, (B, C, H, W); arguments of `condition_text` and `denoise`."""
        text = self.condition_text(text_embeds, text_mask, keep_mask)
        return self.denoise(x_t, t, text, lowres_img, lowres_t)
