"""What the card at hand was made for."""

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def tf32(is_allowed: bool) -> Iterator[None]:
    """Whether cards round the inputs of float32 products and convolutions to 10 bits (TF32).

    By itself torch does so in convolutions. One step of a sampler hides it; a loop adds it up.
    """
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = is_allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
