"""Inputs and outputs of the exported graphs: the one place that names them.

Pictures, times, text and guidance enter in float32 and the prediction leaves in float32 whatever
the precision inside, so every runtime fills the same buffers.
"""

from dataclasses import dataclass
from typing import Literal

from imagen_scale.config import Network
from imagen_scale.sampling.runtimes.options import Precision as Precision

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")

# fp32 keeps attention in its parts: TensorRT-RTX 1.7 refuses the Attention operator in float32.
# Half precision needs opset 23: one Attention node, and norms that keep float32 statistics.
OPSETS: dict[Precision, int] = {"fp32": 21, "fp16": 23, "bf16": 23}
LEAST_ONNXRUNTIME = "1.23"  # the first that computes them all

BATCH, HEIGHT, WIDTH, TOKENS = "batch", "height", "width", "tokens"
IMAGES = "images"  # that go through the network: the batch, or twice the batch where it is guided
Dim = int | str  # a fixed length, or the name of a free one


@dataclass(frozen=True)
class Port:
    """One input or output: its name, its type and its dimensions."""

    name: str
    dims: tuple[Dim, ...]
    dtype: Literal["float32", "bool", "int64"] = "float32"


def denoiser_inputs(
    unet: Network, image_size: int, *, dynamic_size: bool, guided: bool = True
) -> list[Port]:
    """Inputs of a denoiser, in order.

    Args:
        unet: The network.
        image_size: Side of the stage's pictures in pixels.
        dynamic_size: Whether height and width are free.
        guided: Whether it is the guided one, which takes, for each image, what guidance leads away
            from and a guidance scale: `GUIDANCE`.
    """
    side: tuple[Dim, Dim] = (HEIGHT, WIDTH) if dynamic_size else (image_size, image_size)
    image = (BATCH, unet.channels, *side)
    ports = [
        Port("x_t", image),
        Port("t", (BATCH,)),
        Port("text_tokens", (BATCH, unet.max_text_len, unet.cond_dim)),
        Port("text_hidden", (BATCH, unet.time_cond_dim)),
    ]
    if guided:
        ports += [
            Port("null_tokens", (BATCH, unet.max_text_len, unet.cond_dim)),
            Port("null_hidden", (BATCH, unet.time_cond_dim)),
            Port("cond_scale", (BATCH,)),
        ]
    if unet.lowres_cond:
        ports += [Port("lowres_img", image), Port("lowres_t", (BATCH,))]
    return ports


def denoiser_outputs(
    unet: Network, image_size: int, *, dynamic_size: bool, with_deep: bool = False
) -> list[Port]:
    """Outputs of a denoiser, in order: the prediction, and what a shallow one takes besides.

    Args:
        unet: The network.
        image_size: Side of the stage's pictures in pixels.
        dynamic_size: Whether height and width are free.
        with_deep: Whether there are shallow ones beside it.
    """
    x_t = denoiser_inputs(unet, image_size, dynamic_size=dynamic_size)[0]
    # Noise, v or the clean picture, as the U-Net was trained.
    ports = [Port("prediction", (BATCH, unet.channels_out, *x_t.dims[2:]))]
    if with_deep:
        side: tuple[Dim, ...] = x_t.dims[2:]
        if unet.memory_efficient:  # which halves the picture before the finest level
            half = image_size // 2
            side = ("half_height", "half_width") if dynamic_size else (half, half)
        ports.append(Port(DEEP, (IMAGES, unet.dim * unet.dim_mults[0], *side)))
    return ports


def text_encoder_inputs() -> list[Port]:
    """Inputs of a text encoder: numbers of tokens, and 0 where a caption is filled up."""
    return [Port(name, (BATCH, TOKENS), "int64") for name in ("input_ids", "attention_mask")]


def text_encoder_output(embed_dim: int) -> Port:
    """Features of each token, which a conditioner takes cut or filled to `max_text_len`."""
    return Port("text_embeds", (BATCH, TOKENS, embed_dim))


def conditioner_inputs(unet: Network) -> list[Port]:
    """Inputs of the text conditioner: encoder features, cut or filled to `max_text_len`."""
    return [
        Port("text_embeds", (BATCH, unet.max_text_len, unet.text_embed_dim)),
        Port("text_mask", (BATCH, unet.max_text_len), "bool"),
    ]


def conditioner_outputs(unet: Network) -> list[Port]:
    """What the denoiser takes as text."""
    ports = denoiser_inputs(unet, 1, dynamic_size=False)
    return [port for port in ports if port.name in ("text_tokens", "text_hidden")]


GUIDANCE = ("null_tokens", "null_hidden", "cond_scale")  # inputs of the guided denoiser alone
DENOISER, CONDITIONER = "denoiser.onnx", "conditioner.onnx"
UNGUIDED = "denoiser_unguided.onnx"  # its weights are those in denoiser.onnx.data
SHALLOW, UNGUIDED_SHALLOW = "denoiser_shallow.onnx", "denoiser_unguided_shallow.onnx"  # likewise
DEEP = "deep"  # what the finest level takes from those below it: `kept` of `UNet.denoise`


def graph_name(guided: bool, *, shallow: bool = False) -> str:
    """File of the denoiser with guidance or without, whole or of the finest level alone."""
    if shallow:
        return SHALLOW if guided else UNGUIDED_SHALLOW
    return DENOISER if guided else UNGUIDED
