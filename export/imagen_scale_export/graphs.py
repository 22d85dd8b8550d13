"""The functions that are exported, as modules around a trained U-Net; weights are shared."""

import torch
from torch import Tensor, nn

from imagen_scale.diffusion.guidance import guide
from imagen_scale.models.unet import TextCond, UNet


class PlainDenoiser(nn.Module):
    """One evaluation of the U-Net: what a guidance scale of 1 takes.

    Args:
        unet: In evaluation mode, in the precision to compute in.
        with_deep: Give the deeper levels' features, too, which shallow graphs take.
    """

    def __init__(self, unet: UNet, *, with_deep: bool = False) -> None:
        super().__init__()
        self.unet, self.with_deep = unet, with_deep

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        text_tokens: Tensor,
        text_hidden: Tensor,
        lowres_img: Tensor | None = None,
        lowres_t: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Prediction, (B, C, H, W) float32; arguments as in `ports`."""
        dtype = self.unet.final_conv.weight.dtype
        text = TextCond(text_tokens.to(dtype), text_hidden.to(dtype))
        prediction, deep = self.unet.denoise_cached(x_t, t, text, lowres_img, lowres_t)
        return (prediction.float(), deep.float()) if self.with_deep else prediction.float()


class BothBranches(nn.Module):
    """What the plain denoiser takes for the two branches of guidance, in one batch: text first."""

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        text_tokens: Tensor,
        text_hidden: Tensor,
        null_tokens: Tensor,
        null_hidden: Tensor,
        lowres_img: Tensor | None = None,
        lowres_t: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The arguments of `PlainDenoiser`, (2 B, ...); arguments as in `ports`."""
        text = torch.cat((text_tokens, null_tokens)), torch.cat((text_hidden, null_hidden))
        lowres = () if lowres_img is None or lowres_t is None else (lowres_img, lowres_t)
        return (_twice(x_t), _twice(t), *text, *map(_twice, lowres))


class Guidance(nn.Module):
    """The prediction for both branches to the one that guidance makes of it."""

    def forward(self, pair: Tensor, cond_scale: Tensor) -> Tensor:
        """(2 B, C, H, W) and (B,) to (B, C, H, W), float32."""
        # `chunk` would fix the batch of the exported graph.
        cond, null = pair.unflatten(0, (2, -1)).unbind()
        return guide(cond, null, cond_scale[:, None, None, None])


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
