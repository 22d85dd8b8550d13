"""What an exported U-Net is compared with: the network itself, in the same sampling loop."""

import torch

from imagen_scale.diffusion.sampler import sample
from imagen_scale.diffusion.spacing import spaced_times
from imagen_scale.diffusion.thresholding import dynamic_threshold
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from imagen_scale.sampling.runtimes.contract import Text

SCALE = 3.0


def open_file(run, number):
    return read_inference(inference_path(run, number))


def random_text(batch):
    generator = torch.Generator().manual_seed(batch)
    mask = torch.arange(12) < torch.tensor([[3], [12], [7]])[:batch]  # longer than max_text_len
    return Text(torch.randn(batch, 12, 384, generator=generator), mask)


def lowres(number, batch, size):
    if number == 1:
        return {}
    generator = torch.Generator().manual_seed(7)
    return {
        "lowres_img": torch.randn(batch, 3, size, size, generator=generator),
        "lowres_t": torch.full((batch,), 20),
    }


def torch_denoiser(unet, schedule, text, *, lowres_img=None, lowres_t=None, cond_scale=SCALE):
    """The eager network with guidance in two passes."""
    cond = unet.condition_text(*text)

    def denoiser(x_t, t):
        with_text = unet.denoise(x_t, t, cond, lowres_img, lowres_t)
        without = unet.denoise(x_t, t, unet.null_text(len(x_t)), lowres_img, lowres_t)
        prediction = without + (with_text - without) * cond_scale
        return schedule.predicted_x_0(unet.config.pred_type, x_t, t, prediction)

    return denoiser


def pictures(denoiser, schedule, batch, size):
    """20 ancestral steps from one seed; pixel values in 0..255."""
    generator = torch.Generator().manual_seed(0)

    def draw_noise():
        return torch.randn(batch, 3, size, size, generator=generator)

    images = sample(
        denoiser, draw_noise(), schedule, times=spaced_times(100, 20), eta=1.0,
        threshold=lambda x_0: dynamic_threshold(x_0, 0.9), draw_noise=draw_noise,
    )  # fmt: skip
    return (images + 1) * 127.5
