"""What computes a U-Net, seen from above: names and protocols, no network."""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from imagen_scale.diffusion.denoiser import Denoiser
from imagen_scale.errors import UsageError

RuntimeName = Literal["auto", "torch", "compile", "onnx", "tensorrt", "openvino"]
RUNTIMES: tuple[RuntimeName, ...] = ("auto", "torch", "compile", "onnx", "tensorrt", "openvino")
EXPORTED = ("onnx", "tensorrt", "openvino")
Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
Say = Callable[[str], None]


class Text(NamedTuple):
    """Encoded prompts."""

    embeds: Tensor  # (B, L, D) float32
    mask: Tensor  # (B, L) bool


class Runtime(Protocol):
    """One U-Net, ready to have prompts bound to it."""

    name: str
    device: torch.device

    @property
    def max_batch(self) -> int | None:
        """Most images at once; None for any number."""
        ...

    def bind(
        self,
        text: Text,
        *,
        cond_scale: float,
        lowres_img: Tensor | None,
        lowres_t: Tensor | None,
        negative: Text | None = None,
    ) -> Denoiser:
        """Fixes all that does not change from step to step.

        Args:
            text: Encoded prompts of B images.
            cond_scale: Guidance scale; 1 computes one branch only.
            lowres_img: Enlarged and noised low-resolution images, (B, C, H, W), or None.
            lowres_t: Their noise times, (B,), or None.
            negative: One encoded prompt that guidance leads away from, in place of the branch
                without text; only for runtimes that were opened with `negative`.
        """
        ...

    def close(self) -> None:
        """Frees the network."""
        ...


class Options(NamedTuple):
    """How torch computes; exports take the precision only."""

    precision: Precision | None = None  # None: bf16 on a card if trained in it, else fp32
    channels_last: bool = False
    sequential: bool = False  # the two branches of guidance one after the other


def no_negative_prompt(runtime: str) -> UsageError:
    """Why an export takes no negative prompt, and what does."""
    return UsageError(
        f"{runtime}: takes no --negative-prompt, since the branch without text is built "
        f"into its graphs; take --runtime torch."
    )
