"""Trains imagen-pytorch's published package on this project's batches; a child of quality.py.

    python benchmarks/quality_imagen_pytorch.py RUN PICTURES KEY=VALUE...

Its own trainer, objective, optimizer and average, as they come; its U-Nets with the configuration's
widths, which have about as many parameters as ours. Its pictures are measured here, by the
functions that `imagen-scale evaluate` measures ours with, since its networks are not ours.
"""

import inspect
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peers
import quality_batches
import torch
from torch import Tensor

from imagen_scale.config import StageConfig, load_config
from imagen_scale.data.embeddings import pad_embeddings
from imagen_scale.data.prepared import prepare, real_pictures
from imagen_scale.data.split import split
from imagen_scale.diffusion.lowres import shrink_and_enlarge
from imagen_scale.diffusion.prediction_error import LOG_SNRS
from imagen_scale.evaluation.distances import kernel_distance
from imagen_scale.evaluation.features import open_extractor
from imagen_scale.files.pictures import to_uint8
from imagen_scale.sampling.measures import ColourTally, drift, psnr_db

CONFIG = peers.ROOT / "configs" / "emoji_demo.json"
SAMPLING_STEPS, SCALE = 100, 2.0  # of its ancestral sampler, which needs more of them than ours


def main() -> None:
    """Trains both U-Nets, draws and measures."""
    run, pictures, overrides = Path(sys.argv[1]), int(sys.argv[2]), tuple(sys.argv[3:])
    config = load_config(CONFIG, overrides)
    run.mkdir(parents=True, exist_ok=True)
    _, unet_class = peers.import_unets()
    from imagen_pytorch import Imagen, ImagenTrainer

    torch.manual_seed(config.training.seed)
    prepared = prepare(config)
    dim = prepared.embeddings.dim
    stages = config.stages(dim)
    imagen = Imagen(
        [unet_class(**_known(unet_class, stage)) for stage in stages],
        text_embed_dim=dim, image_sizes=config.imagen.image_sizes,
        timesteps=config.imagen.timesteps, cond_drop_prob=config.imagen.cond_drop_prob,
    )  # fmt: skip
    seconds, averaged = [], []
    for stage in stages:
        trainer = ImagenTrainer(imagen, verbose=False)  # each trains one U-Net
        for step in quality_batches.steps(config, stage, prepared):
            trainer(
                step.images, text_embeds=step.text_embeds, text_masks=step.text_mask,
                unet_number=stage.number,
            )  # fmt: skip
            trainer.update(unet_number=stage.number)
        seconds.append(time.process_time())
        averaged.append(trainer.get_ema_unet(stage.number).ema_model)

    imagen.unets = torch.nn.ModuleList(averaged)
    imagen.eval()
    for scheduler in imagen.noise_schedulers:
        scheduler.num_timesteps = SAMPLING_STEPS
    indices = split(config.data, prepared.source)[1][:pictures]
    captions = [prepared.source.captions[i] for i in indices]
    text, mask = pad_embeddings(
        [prepared.embeddings.stored(caption) for caption in captions],
        max(stage.unet.max_text_len for stage in stages),
    )
    said = {"text_embeds": text.float(), "text_masks": mask, "use_tqdm": False}
    plain = 2 * imagen.sample(cond_scale=1.0, stop_at_unet_number=1, **said) - 1
    drawn = imagen.sample(cond_scale=SCALE, return_all_unet_outputs=True, **said)
    base, larger = (2 * images - 1 for images in drawn)
    real, real_larger = (real_pictures(prepared, indices, stage.size) for stage in stages)
    restored = (
        2
        * imagen.sample(
            cond_scale=SCALE, start_at_unet_number=2, start_image_or_video=(real + 1) / 2, **said
        )
        - 1
    )
    extractor = open_extractor("efficientnet-lite0")
    bicubic = shrink_and_enlarge(real_larger, stages[0].size)
    measured = {
        "seconds": seconds[0],
        "x_0_error": x_0_error(imagen, real, text.float(), mask, config.training.seed),
        "drift": 255 * _drift(base, real),
        "plain_drift": 255 * _drift(plain, real),
        "kid": 1000 * kernel_distance(extractor(base), extractor(real)),
        "psnr_gain": (psnr_db(restored, real_larger) - psnr_db(bicubic, real_larger)).mean().item(),
        "sr_drift": 255 * _drift(larger, real_larger),
    }
    np.save(run / "pictures.npy", to_uint8(larger))
    (run / "measured_by_peer.json").write_text(json.dumps(measured))


@torch.no_grad()
def x_0_error(imagen: Any, x_0: Tensor, text: Tensor, mask: Tensor, seed: int) -> float:
    """Mean squared error of the clean picture that the base predicts, as `evaluate` tells it."""
    scheduler, unet = imagen.noise_schedulers[0], imagen.unets[0]
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for t in _times(scheduler):
        times = torch.full((len(x_0),), t)
        noise = torch.randn(x_0.shape, generator=generator)
        x_t, log_snr, _, _ = scheduler.q_sample(x_0, times, noise)
        predicted = unet(x_t, log_snr, text_embeds=text, text_mask=mask, cond_drop_prob=0.0)
        found = scheduler.predict_start_from_noise(x_t, times, predicted)
        errors.append((found - x_0).square().mean().item())
    return sum(errors) / len(errors)


def _times(scheduler: Any) -> Iterator[float]:
    """Its times, from 0 to 1, at the log-SNRs of the evaluation."""
    grid = torch.linspace(0, 1, 100_001)
    log_snr = scheduler.log_snr(grid)
    for wanted in LOG_SNRS:
        yield grid[(log_snr - wanted).abs().argmin()].item()


def _drift(generated: Tensor, real: Tensor) -> float:
    means = []
    for images in (generated, real):
        tally = ColourTally()
        tally.add(images)
        means.append(tally.colour().mean)
    return drift(*means)


def _known(unet_class: Any, stage: StageConfig) -> dict[str, Any]:
    """Our network's values under the names that its U-Net takes."""
    network = vars(stage.network)
    return {k: network[k] for k in inspect.signature(unet_class).parameters if k in network}


if __name__ == "__main__":
    main()
