"""Trains MinImagen's published package on this project's batches; a child of quality.py.

    python benchmarks/quality_minimagen.py RUN KEY=VALUE...

Its own `Imagen` makes the loss and torch's Adam at 1e-4 steps it, as its training script does; the
weights become a run of this project, whose network is the same.
"""

import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any

import peers
import quality_batches
import torch

from imagen_scale.config import Config, StageConfig, dump_config, load_config
from imagen_scale.data.encoder import encoder_fingerprint, encoder_folder
from imagen_scale.data.prepared import Prepared, prepare
from imagen_scale.runs.folders import config_path, inference_path
from imagen_scale.runs.inference import InferenceFile, save_inference

CONFIG = peers.ROOT / "configs" / "emoji_demo.json"
LR, CLIP = 1e-4, 50.0  # its training script's


def main() -> None:
    """Trains both U-Nets and writes the run."""
    run, overrides = Path(sys.argv[1]), tuple(sys.argv[2:])
    config = load_config(CONFIG, overrides)
    unet_class, _ = peers.import_unets()  # first: transformers imports its torchvision, too
    prepared = prepare(config)
    from minimagen.Imagen import Imagen

    torch.manual_seed(config.training.seed)
    dim = prepared.embeddings.dim
    stages = config.stages(dim)
    imagen = Imagen(
        [unet_class(**_known(unet_class, stage)) for stage in stages],
        text_encoder_name="t5_small", text_embed_dim=dim, image_sizes=config.imagen.image_sizes,
        timesteps=config.imagen.timesteps, cond_drop_prob=config.imagen.cond_drop_prob,
    )  # fmt: skip
    seconds = [train(imagen, config, stage, prepared) for stage in stages]
    for stage, unet in zip(stages, imagen.unets, strict=True):
        file = InferenceFile(
            inference_path(run, stage.number), config, stage.number, dim,
            encoder_fingerprint(encoder_folder(config.text_encoder)),
            step=stage.steps, steps=stage.steps,
        )  # fmt: skip
        save_inference(
            file, {name: value.contiguous() for name, value in unet.state_dict().items()}
        )
    config_path(run).write_text(dump_config(config), encoding="utf-8")
    (run / "seconds.json").write_text(json.dumps(seconds[0]))


def _known(unet_class: Any, stage: StageConfig) -> dict[str, Any]:
    """Our network's values under the names that its U-Net takes."""
    network = vars(stage.network)
    return {k: network[k] for k in inspect.signature(unet_class).parameters if k in network}


def train(imagen: Any, config: Config, stage: StageConfig, prepared: Prepared) -> float:
    """Trains one U-Net on the pictures that our trainer would see.

    Returns:
        Processor seconds of this process until now.
    """
    imagen._get_unet(stage.number)
    unet = imagen.unets[stage.number - 1].train()
    optimizer = torch.optim.Adam(unet.parameters(), lr=LR)
    for step in quality_batches.steps(config, stage, prepared):
        loss = imagen(
            step.images, text_embeds=step.text_embeds, text_masks=step.text_mask,
            unet_number=stage.number,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), CLIP)
        optimizer.step()
    return time.process_time()


if __name__ == "__main__":
    main()
