"""What the teacher of a stage that learns few steps takes beside it: memory and time."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from imagen_scale.config import StageConfig
from imagen_scale.config.distillation import FewSteps
from imagen_scale.models.unet import UNet
from imagen_scale.planning.activations import default_dtype
from imagen_scale.planning.live_bytes import LiveBytes

# Pictures in float32 that a teacher's steps hold beside the network's own: x_t, x, the prediction
# and the one before, and what guidance, thresholding and a step make of them.
PICTURES = 8


def evaluations(few: FewSteps) -> int:
    """Forward passes of the teacher for each sample; of a teacher of few steps, at most."""
    per_segment = few.steps_of_ordinary_teacher // few.steps
    return per_segment * (1 if few.cond_scale == 1 else 2)


def forward_bytes(stage: StageConfig, few: FewSteps, *, micro_batch: int, precision: str) -> int:
    """Bytes of the teacher's forward pass at its worst moment, without its weights.

    The real network on tensors without memory, with both branches of guidance in one batch. It is
    over when the student's pass begins.

    Args:
        stage: The student, whose network is the teacher's.
        few: How it learns.
        micro_batch: Pictures.
        precision: "bf16", "fp16" (as many bytes) or "fp32".
    """
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    batch = micro_batch * (1 if few.cond_scale == 1 else 2)
    side, channels, network = stage.train_size, stage.imagen.channels, stage.network
    with FakeTensorMode(), torch.no_grad():
        with default_dtype(dtype):
            unet = UNet(network).eval()
        images = torch.zeros(batch, channels, side, side)
        t = torch.zeros(batch, dtype=torch.int64)
        lowres = (images, t) if stage.is_super_resolution else ()
        text = unet.null_text(batch)
        with LiveBytes() as live:
            unet.denoise(images, t, text, *lowres).float()
        return live.peak + PICTURES * 4 * micro_batch * channels * side**2
