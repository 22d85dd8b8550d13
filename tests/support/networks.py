"""Tiny U-Nets of 8 and 16 px, and inputs for them."""

import json

import torch

from imagen_scale.config import parse_config
from imagen_scale.models.unet import UNet


def make_unet(index=0, **changes):
    """A U-Net with random weights, the second one for super-resolution."""
    unet = {"dim": 8, "dim_mults": [1, 2], "max_text_len": 6, "attend_at_middle": True} | changes
    config = {
        "imagen": {"image_sizes": [8, 16], "text_encoder_name": "minilm"},
        "unets": [unet, unet],
        "training": {"precision": "fp32"},
    }
    torch.manual_seed(0)
    return UNet(parse_config(json.dumps(config)).stage(index + 1, 384).network)


def make_inputs(index=0, batch=3, tokens=4, size=8):
    """Inputs of that U-Net, always the same."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    inputs = {
        "x_t": normal(batch, 3, size, size),
        "t": torch.tensor([0, 500, 999])[:batch],
        "text_embeds": normal(batch, tokens, 384),
        "text_mask": torch.ones(batch, tokens, dtype=torch.bool),
    }
    if index:
        inputs |= {"lowres_img": normal(batch, 3, size, size), "lowres_t": torch.tensor([0, 9, 99])}
    return inputs
