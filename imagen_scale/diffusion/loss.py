"""Training losses."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

LossType = Literal["l1", "l2", "huber"]
_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}


def image_loss(prediction: Tensor, target: Tensor, loss_type: LossType) -> Tensor:
    """Mean loss of each image, (B,) float32.

    Args:
        prediction: What the network gave, (B, C, H, W).
        target: What it should have given: the noise, or v; same shape.
        loss_type: l1, l2 or huber (with threshold 1), as MinImagen's.
    """
    losses = _LOSSES[loss_type](prediction.float(), target.float(), reduction="none")
    return losses.flatten(1).mean(1)
