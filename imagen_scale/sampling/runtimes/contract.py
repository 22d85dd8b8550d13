"""What computes a U-Net, seen from above: names and protocols, no network."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from imagen_scale.config import StageConfig
from imagen_scale.diffusion.caching import DeepCache
from imagen_scale.diffusion.denoiser import Denoiser
from imagen_scale.diffusion.guidance import Branch, branches
from imagen_scale.errors import ShapeError, UsageError, option

Say = Callable[[str], None]


class Text(NamedTuple):
    """Encoded prompts; one without a token is the branch without text, as training knew it."""

    embeds: Tensor  # (B, L, D) float32
    mask: Tensor  # (B, L) bool

    @property
    def is_kept(self) -> Tensor:
        """False where there is no text, (B,) bool: `keep_mask` of `UNet.condition_text`."""
        return self.mask.any(dim=1)


class Conditioning(NamedTuple):
    """All that a network is given beside the noisy images and their time, for B images."""

    text: Text
    # Guidance: 1 is the branch with the text alone, 0 the one without; or one for each image, (B,)
    # float32, where they differ.
    cond_scale: float | Tensor
    lowres_img: Tensor | None = None  # enlarged and noised, (B, C, H, W)
    lowres_t: Tensor | None = None  # times of that noise, (B,) int64
    negative: Text | None = None  # one prompt, in place of the branch without text
    # Of `lowres_residual`: the enlarged picture without noise, which the prediction is added to.
    base: Tensor | None = None

    @property
    def branches(self) -> frozenset[Branch]:
        """The predictions that are needed: both where guidance differs from image to image."""
        if isinstance(self.cond_scale, Tensor):
            return frozenset({"text", "null"})
        return branches(self.cond_scale)

    @property
    def unguided(self) -> "Conditioning":
        """The same where guidance does not act: what is above 1 is 1."""
        if isinstance(self.cond_scale, Tensor):
            scale = self.cond_scale.clamp(max=1)
            return self._replace(cond_scale=1.0 if (scale == 1).all() else scale)
        return self._replace(cond_scale=min(self.cond_scale, 1.0))

    def check(self, stage: StageConfig) -> None:
        """Refuses low-resolution pictures that a stage does not take, and misses those it does.

        Raises:
            ShapeError: Saying which.
            UsageError: If a stage of few steps is to be guided.
        """
        has_lowres = self.lowres_img is not None and self.lowres_t is not None
        if stage.is_super_resolution != has_lowres:
            raise ShapeError(
                "lowres_img and lowres_t go with super-resolution U-Nets, and with no other."
            )
        if stage.unet.lowres_residual != (self.base is not None):
            raise ShapeError("base goes with U-Nets of lowres_residual, and with no other.")
        if (few := stage.few_steps) and (len(self.branches) == 2 or self.negative):
            scale = self.cond_scale
            asked = scale.tolist() if isinstance(scale, Tensor) else f"{scale:g}"
            raise UsageError(
                f"{option('cond_scale')} {asked}: {stage.name} learned to take few "
                f"steps with guidance {few.cond_scale:g} built in; leave it out."
            )

    def completed(self, x_0: Tensor) -> Tensor:
        """The clean picture from what the network says of it."""
        return x_0 if self.base is None else self.base.to(x_0) + x_0


class Runtime(Protocol):
    """One U-Net, ready to have prompts bound to it."""

    name: str
    device: torch.device

    @property
    def max_batch(self) -> int | None:
        """Most images at once; None for any number."""
        ...

    def bind(self, cond: Conditioning, cache: DeepCache | None = None) -> Denoiser:
        """Fixes all that does not change from step to step.

        Args:
            cond: That is fixed.
            cache: Says which evaluations are whole; None: all.

        Raises:
            ShapeError: If low-resolution images are missing, or not wanted.
            UsageError: If a stage of few steps is to be guided.
        """
        ...

    def close(self) -> None:
        """Frees the network."""
        ...
