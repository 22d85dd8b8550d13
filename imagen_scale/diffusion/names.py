"""Names of samplers and spacings; needs no torch, so that command lines can offer them."""

from typing import Literal

Sampler = Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun"]
Spacing = Literal["linear", "trailing", "logsnr", "karras"]
SpacingChoice = Literal["auto", "linear", "trailing", "logsnr", "karras"]
