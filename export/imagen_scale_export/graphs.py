"""The functions that are exported, as modules around a trained U-Net; weights are shared."""

import torch
from torch import Tensor, nn

from imagen_scale.diffusion.guidance import guide
from imagen_scale.models.unet import TextCond, UNet


class GuidedDenoiser(nn.Module):
    """Both branches of classifier-free guidance in one batch.

    Args:
        unet: In evaluation mode, in the precision to compute in.
    """

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        text_tokens: Tensor,
        text_hidden: Tensor,
        null_tokens: Tensor,
        null_hidden: Tensor,
        cond_scale: Tensor,
        lowres_img: Tensor | None = None,
        lowres_t: Tensor | None = None,
    ) -> Tensor:
        """Guided prediction (noise or v), (B, C, H, W) float32; arguments as in `ports`."""
        dtype = self.unet.final_conv.weight.dtype
        text = TextCond(
            torch.cat((text_tokens, null_tokens)).to(dtype),
            torch.cat((text_hidden, null_hidden)).to(dtype),
        )
        pair = self.unet.denoise(
            _twice(x_t),
            _twice(t),
            text,
            None if lowres_img is None else _twice(lowres_img),
            None if lowres_t is None else _twice(lowres_t),
        )
        # `chunk` would fix the batch of the exported graph.
        cond, without_text = pair.float().unflatten(0, (2, -1)).unbind()
        return guide(cond, without_text, cond_scale[:, None, None, None])


class PlainDenoiser(nn.Module):
    """The conditional branch alone: what a guidance scale of 1 gives, for half the work."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        text_tokens: Tensor,
        text_hidden: Tensor,
        lowres_img: Tensor | None = None,
        lowres_t: Tensor | None = None,
    ) -> Tensor:
        """Prediction (noise or v), (B, C, H, W) float32; arguments as in `ports`."""
        dtype = self.unet.final_conv.weight.dtype
        text = TextCond(text_tokens.to(dtype), text_hidden.to(dtype))
        return self.unet.denoise(x_t, t, text, lowres_img, lowres_t).float()


class Conditioner(nn.Module):
    """What depends on the text alone: encoder features to tokens and pooled text."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, text_embeds: Tensor, text_mask: Tensor) -> TextCond:
        """As `UNet.condition_text`, for features cut or filled to `max_text_len`."""
        return self.unet.condition_text(text_embeds, text_mask)


def _twice(x: Tensor) -> Tensor:
    return torch.cat((x, x))
