"""What one forward and backward pass needs beyond weights, found without running it."""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from imagen_scale.config import StageConfig
from imagen_scale.config.section import CheckpointingLevel
from imagen_scale.diffusion.loss import image_loss
from imagen_scale.diffusion.lowres import shrink_and_enlarge
from imagen_scale.models.memory import apply_checkpointing
from imagen_scale.models.unet import UNet
from imagen_scale.planning.live_bytes import LiveBytes


class Activations(NamedTuple):
    """One pass over a micro-batch; bytes on the device that computes."""

    num_parameters: int
    largest_parameter: int  # elements
    adafactor_elements: int  # of its factored second moments
    held: int  # between forward and backward
    peak: int  # at the worst moment, gradients taken away as they appear
    on_host: int  # held in host memory (`memory.offload_activations`)


def measure(
    stage: StageConfig,
    *,
    micro_batch: int,
    checkpointing: tuple[CheckpointingLevel, ...],
    precision: str | None = None,
    offload_activations: bool = False,
    real: bool = False,
) -> Activations:
    """Runs the real U-Net's training pass on tensors without memory.

    Takes seconds and a few hundred MB for networks of any size.

    Args:
        stage: The U-Net.
        micro_batch: Pictures.
        checkpointing: Per resolution level, as for `apply_checkpointing`.
        precision: "bf16", "fp16" (as many bytes) or "fp32"; None for what is written.
        offload_activations: As in the configuration.
        real: Run on real CPU tensors instead, to check the prediction.
    """
    is_fp32 = (precision or stage.training.precision) == "fp32"
    dtype = torch.float32 if is_fp32 else torch.bfloat16
    parked = _Parked()
    with nullcontext() if real else FakeTensorMode():
        with default_dtype(dtype):
            unet = UNet(stage.network)
        hold = parked.hold if offload_activations else nullcontext
        apply_checkpointing(unet, checkpointing, hold=hold).train()
        parameters = list(unet.parameters())
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        gc.collect()  # nothing of an earlier run may die while this one is counted
        with LiveBytes() as live:
            loss = _loss(unet, stage, micro_batch)
            held, on_host = live.now, parked.bytes
            loss.backward()
        return Activations(
            num_parameters=sum(parameter.numel() for parameter in parameters),
            largest_parameter=max(parameter.numel() for parameter in parameters),
            adafactor_elements=sum(_factors(parameter) for parameter in parameters),
            held=held,
            peak=live.peak,
            on_host=on_host,
        )


def step_flops(
    stage: StageConfig,
    *,
    checkpointing: tuple[CheckpointingLevel, ...],
) -> int:
    """Floating point operations of one picture: forward, backward and what is computed twice."""
    counter = FlopCounterMode(display=False)  # keeps tensors alive, so bytes are not counted here
    with FakeTensorMode():
        unet = UNet(stage.network)
        apply_checkpointing(unet, checkpointing).train()
        with counter:
            _loss(unet, stage, 1).backward()
    return counter.get_total_flops()


def _factors(parameter: Tensor) -> int:
    """Elements of Adafactor's second moment: a row and a column, or the whole of a vector."""
    if parameter.ndim < 2:
        return parameter.numel()
    return len(parameter) + parameter.numel() // len(parameter)


def _loss(unet: UNet, stage: StageConfig, batch: int) -> Tensor:
    """The tensors of `training.Objective.loss`, which needs generators and real pictures."""
    imagen, network, crop = stage.imagen, stage.network, stage.unet.crop
    images = torch.zeros(batch, imagen.channels, stage.size, stage.size)
    t = torch.zeros(batch, dtype=torch.int64)
    lowres: tuple[Tensor, ...] = ()
    if stage.small_size is not None:
        lowres_img = _crop(shrink_and_enlarge(images, stage.small_size), crop)
        lowres = (lowres_img + torch.zeros_like(lowres_img), t)
    x_0 = _crop(images, crop)
    eps = torch.zeros_like(x_0)
    x_t = x_0 + eps
    is_computed = network.pred_type == "v" or stage.unet.lowres_residual
    target = x_0 - eps if is_computed else {"eps": eps, "x0": x_0}[network.pred_type]
    tokens = min(network.max_text_len, 256)
    text_embeds = torch.zeros(batch, tokens, network.text_embed_dim)
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    keep = torch.ones(batch, dtype=torch.bool)
    prediction = unet(x_t, t, text_embeds, mask, keep, *lowres)
    return image_loss(prediction, target, imagen.loss_type).mean()


def _crop(images: Tensor, side: int | None) -> Tensor:
    return images if side is None else images[:, :, :side, :side].clone()


def _drop_gradient(parameter: Tensor) -> None:
    """Every engine counts its gradients by itself."""
    parameter.grad = None


class _Parked:
    """Stands for host memory: counts what is put there and keeps only its shape."""

    def __init__(self) -> None:
        self.bytes = 0

    def hold(self) -> AbstractContextManager[Any]:
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        self.bytes += tensor.nbytes
        return tensor.shape, tensor.dtype

    def _unpack(self, packed: tuple[torch.Size, torch.dtype]) -> Tensor:
        return torch.empty(packed[0], dtype=packed[1])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it, new tensors of floating point numbers are of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
