"""A run whose U-Nets were never trained: enough to sample from."""

import json
from pathlib import Path

import torch
from conftest import TINY

from imagen_scale.config import dump_config, parse_config
from imagen_scale.data.encoder import encoder_fingerprint, encoder_folder
from imagen_scale.models.unet import UNet
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import InferenceFile, save_inference


def write_run(run: Path) -> None:
    """Writes the configuration and the inference files of a tiny cascade."""
    config = parse_config(json.dumps(TINY))
    run.mkdir(parents=True)
    (run / "config.json").write_text(dump_config(config))
    for number in (1, 2):
        torch.manual_seed(number)
        unet = UNet(config.stage(number, 384).network)
        file = InferenceFile(
            inference_path(run, number), config, number, text_embed_dim=384,
            text_fingerprint=encoder_fingerprint(encoder_folder("minilm")),
            step=6, steps=6,
        )  # fmt: skip
        save_inference(file, unet.state_dict())
