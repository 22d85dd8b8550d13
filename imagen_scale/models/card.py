"""What the card at hand was made for."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BF16_CAPABILITY = (8, 0)  # NVIDIA's Ampere: RTX 30xx, A100


def has_bf16(device: "torch.device | int | None" = None) -> bool:
    """Whether a card computes bf16 itself.

    `torch.cuda.is_bf16_supported` also counts what older cards emulate, many times slower.
    """
    import torch

    return torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
