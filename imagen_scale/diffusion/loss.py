"""Training losses, and what each time weighs in them."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_scale.diffusion.schedule import NoiseSchedule, PredType

LossType = Literal["l1", "l2", "huber"]
LossWeight = Literal["x0", "eps", "v", "v_clipped", "min_snr", "sigmoid"]
_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}

V_CLIP = 10.0  # largest weight of v_clipped
MIN_SNR_GAMMA = 5.0  # largest weight of min_snr, the paper's own
SIGMOID_BIAS = 2.0  # log-SNR at which half of sigmoid's weight on the noise is left


def image_loss(prediction: Tensor, target: Tensor, loss_type: LossType) -> Tensor:
    """Mean loss of each image, (B,) float32.

    Args:
        prediction: What the network gave, (B, C, H, W).
        target: What it should have given: the noise, v or the clean picture; same shape.
        loss_type: l1, l2 or huber (with threshold 1), as MinImagen's.
    """
    losses = _LOSSES[loss_type](prediction.float(), target.float(), reduction="none")
    return losses.flatten(1).mean(1)


def loss_factors(schedule: NoiseSchedule, pred_type: PredType, weight: LossWeight) -> Tensor:
    """What the squared error of a prediction is multiplied by at each time, (T,) float32.

    A weight says what the squared error of x_0 counts. That of the noise is SNR times, that of v
    1 + SNR times the error of x_0, so what is predicted is multiplied by the weight divided by
    its own. The mean over all times is 1, as without a weight, so that learning rates keep their
    meaning.

    Args:
        schedule: Noise schedule of T times.
        pred_type: What the network predicts; "eps" not where the schedule ends in noise alone.
        weight: See `x_0_weights`.
    """
    own = x_0_weights(schedule.snr, pred_type)
    factors = x_0_weights(schedule.snr, weight) / own
    return (factors / factors.mean()).float()


def x_0_weights(snr: Tensor, weight: LossWeight) -> Tensor:
    """What the squared error of x_0 counts at each SNR.

    - x0: 1. eps: SNR. v: 1 + SNR. They make the plain loss of what they are called after.
    - v_clipped: min(1 + SNR, 10).
    - min_snr: min(SNR, 5) (Hang et al. 2023, arXiv:2303.09556, equation 8).
    - sigmoid: SNR sigmoid(2 - log SNR), a smooth min_snr (Kingma & Gao 2023, arXiv:2303.00848,
      who weigh the error of the noise; Hoogeboom et al. 2024, arXiv:2410.19324). They mean it for
      log-SNRs drawn evenly; here times are, as for the other weights.
    """
    match weight:
        case "x0":
            return torch.ones_like(snr)
        case "eps":
            return snr
        case "v":
            return 1 + snr
        case "v_clipped":
            return (1 + snr).clamp(max=V_CLIP)
        case "min_snr":
            return snr.clamp(max=MIN_SNR_GAMMA)
        case "sigmoid":
            most = math.exp(SIGMOID_BIAS)
            return snr * most / (snr + most)
