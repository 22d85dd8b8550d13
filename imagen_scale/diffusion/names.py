"""Names of samplers and spacings, and of what they work on; needs no torch."""

from typing import Any, Literal, TypeAlias

Array: TypeAlias = Any  # of any library: torch's tensors and NumPy's arrays alike

Sampler = Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun"]
Spacing = Literal["linear", "trailing", "logsnr", "karras", "middle"]
SpacingChoice = Literal["auto", "linear", "trailing", "logsnr", "karras", "middle"]
