"""How good a trained cascade is, measured without any downloaded network."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imagen_scale.cascade import Cascade, OnStep
from imagen_scale.data.dataset import Prepared, real_pictures
from imagen_scale.diffusion.lowres import resize, shrink_and_enlarge


class Evaluation(NamedTuple):
    """Results over N captions of the training data."""

    captions: int
    retrieval_accuracy: list[float]  # one per stage, in [0, 1]
    retrieval_chance: float
    sr_psnr_db: list[float]  # one per super-resolution stage, mean over the pictures
    bicubic_psnr_db: list[float]


def retrieval_accuracy(generated: Tensor, real: Tensor, size: int) -> float:
    """Share of generated pictures whose nearest real picture is the prompted one.

    Nearest by L2 distance on RGB, both downsampled to `size`.

    Args:
        generated: (N, 3, H, W) in [-1, 1]; the i-th was made from the caption of real[i].
        real: (N, 3, h, w) in [-1, 1].
        size: Side of the compared pictures in pixels.
    """
    distances = torch.cdist(resize(generated, size).flatten(1), resize(real, size).flatten(1))
    return (distances.argmin(dim=1) == torch.arange(len(real))).float().mean().item()


def psnr_db(images: Tensor, real: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, (N,); both in [-1, 1].

    Infinite where the pictures are equal.
    """
    error = ((images - real) / 2).square().flatten(1).mean(1)
    return -10 * error.log10()


def evaluate(
    cascade: Cascade,
    prepared: Prepared,
    indices: Sequence[int],
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Evaluation:
    """Generates a picture for each caption and compares it with the real ones.

    Super-resolution is measured on the real pictures, shrunk to the stage's input, against
    bicubic enlargement of the same input.

    Args:
        cascade: The trained stages.
        prepared: Pictures and captions.
        indices: Which of them to use.
        seed: Of the first picture; the i-th uses seed + i.
        on_step: Told of each step.
        settings: As for `Cascade.settings`.
    """
    captions = [prepared.source.captions[i] for i in indices]
    text = cascade.encode(captions)
    seeds = [seed + i for i in range(len(captions))]
    base_size = cascade.files[0].config.imagen.image_sizes[0]
    accuracies, sr_psnr, bicubic_psnr = [], [], []
    lowres = None
    for number, how in enumerate(cascade.settings(**settings), start=1):
        stage = cascade.stage(number)
        real = real_pictures(prepared, indices, stage.image_size)
        options = {"on_step": on_step, **how._asdict()}
        generated = stage.sample(text, seeds, lowres=lowres, **options)
        accuracies.append(retrieval_accuracy(generated, real, base_size))
        if lowres is not None:
            small = lowres.shape[-1]
            restored = stage.sample(text, seeds, lowres=resize(real, small), **options)
            sr_psnr.append(psnr_db(restored, real).mean().item())
            bicubic_psnr.append(psnr_db(shrink_and_enlarge(real, small), real).mean().item())
        lowres = generated
        stage.close()
    return Evaluation(
        captions=len(captions),
        retrieval_accuracy=accuracies,
        retrieval_chance=1 / len(captions),
        sr_psnr_db=sr_psnr,
        bicubic_psnr_db=bicubic_psnr,
    )
