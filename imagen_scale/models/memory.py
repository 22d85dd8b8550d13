"""Memory techniques applied to a built U-Net from outside; the function computed stays the same."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from imagen_scale.config.section import CheckpointingLevel
from imagen_scale.files.pinning import can_pin
from imagen_scale.models.layers import (
    Attention,
    Block,
    CrossAttention,
    FeedForward,
    ResnetBlock,
    ToOut,
    TransformerBlock,
    Upsample,
)
from imagen_scale.models.unet import UNet

# What "norms" recomputes: normalisations, activations, joins and enlargements up to the next
# convolution or projection, which itself is not repeated: recomputation stops as soon as the
# last tensor that backward needs is there.
_CHEAP: dict[type[nn.Module], tuple[str, ...]] = {
    Block: ("forward",),
    FeedForward: ("expand", "contract"),
    Attention: ("project",),
    CrossAttention: ("project",),
    ToOut: ("forward",),
    Upsample: ("forward",),
}


# Makes a context in which tensors are saved for backward in some place or other.
Hold = Callable[[], AbstractContextManager[Any]]


def in_host_memory() -> AbstractContextManager[Any]:
    """Saves tensors in host memory, pinned where that is possible, and brings them back."""
    return save_on_cpu(pin_memory=can_pin())


def apply_checkpointing(
    unet: UNet, levels: tuple[CheckpointingLevel, ...], *, hold: Hold = nullcontext
) -> UNet:
    """Makes a U-Net recompute in backward what it would otherwise hold.

    Gradients stay equal bit for bit.

    Args:
        unet: The network, changed in place.
        levels: One per resolution level of the U-Net, finest first. "none" recomputes nothing;
            "norms" recomputes normalisations and activations; "blocks" keeps of each residual and
            attention block only its input.
        hold: Where to keep what recomputation starts from, e.g. `in_host_memory`.

    Returns:
        The same network.

    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    for number, level in enumerate(levels):
        for part in _parts(unet, number):
            if level != "none":
                _apply(part, level, hold)
    return unet


def _parts(unet: UNet, level: int) -> Iterator[nn.Module]:
    """The modules of one resolution level."""
    yield unet.downs[level]
    yield unet.ups[-1 - level]
    if level == 0:
        yield unet.final_res_block
    if level == len(unet.downs) - 1:
        yield unet.mid_block1
        yield unet.mid_block2
        if unet.mid_attn is not None:
            yield unet.mid_attn


def _apply(module: nn.Module, level: CheckpointingLevel, hold: Hold) -> None:
    if level == "blocks" and isinstance(module, ResnetBlock | TransformerBlock):
        _recompute(module, "forward", hold)
        return
    for name in _CHEAP.get(type(module), ()):
        _recompute(module, name, hold)
    for child in module.children():
        _apply(child, level, hold)


def _recompute(module: nn.Module, name: str, hold: Hold) -> None:
    """Replaces a method by one that is run again in backward.

    The features, its first argument and `skip`, are what is held. The small arguments beside them
    (time, tokens) are shared by many blocks, so they are bound rather than passed: offloading
    would copy them anew each time.
    """
    method: Callable[..., Any] = getattr(module, name)

    def method_recomputed(x: Tensor, *args: Any, **features: Tensor) -> Any:
        if not module.training:
            return method(x, *args, **features)
        with hold():
            # No random numbers are drawn in the blocks, so their state need not be kept.
            return checkpoint(
                lambda x, *values: method(x, *args, **dict(zip(features, values, strict=True))),
                x, *features.values(), use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip

    setattr(module, name, method_recomputed)
