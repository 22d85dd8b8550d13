"""Memory techniques applied to a built U-Net from outside; the function computed stays the same."""

from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from imagen_scale.models.layers import ResnetBlock, TransformerBlock

CheckpointingLevel = Literal["none", "blocks"]


def apply_checkpointing(unet: nn.Module, level: CheckpointingLevel) -> nn.Module:
    """Makes a U-Net recompute in backward what it would otherwise hold.

    Args:
        unet: The network, changed in place.
        level: "none", or "blocks": every residual and attention block keeps only its inputs.

    Returns:
        The same network.

    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    if level == "blocks":
        for module in unet.modules():
            if isinstance(module, ResnetBlock | TransformerBlock):
                _recompute(module)
    return unet


def _recompute(module: nn.Module) -> None:
    forward = module.forward

    def forward_recomputed(*args: Any) -> Any:
        if not module.training:
            return forward(*args)
        # No random numbers are drawn in the blocks, so their state need not be kept.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)

    module.forward = forward_recomputed
