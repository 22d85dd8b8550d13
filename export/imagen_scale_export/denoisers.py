"""A trained U-Net to ONNX files: the denoiser, with guidance and without, and the conditioner."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_scale.errors import ExportError
from imagen_scale.models.unet import UNet
from imagen_scale.sampling.runtimes.ports import (
    OPSETS,
    Precision,
    conditioner_inputs,
    conditioner_outputs,
    denoiser_inputs,
    denoiser_outputs,
    graph_name,
)
from imagen_scale_export.graphs import BothBranches, Conditioner, PlainDenoiser
from imagen_scale_export.group_norm import GROUP_NORM, group_norm_in_parts
from imagen_scale_export.guided import export_guided
from imagen_scale_export.shallow import export_shallow
from imagen_scale_export.to_onnx import EXAMPLE_BATCH, example_inputs, export_graph

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# Half of float16's range: what the calibration inputs reach, others may exceed.
FP16_LIMIT = 3e4


def export_denoisers(
    unet: UNet, folder: Path, *, image_size: int, precision: Precision, dynamic_size: bool,
    guided: bool = True, whole_norms: bool = False, shallow: bool = False,
) -> None:  # fmt: skip
    """Writes the denoiser for a guidance scale of 1 and, over the same weights, the guided one.

    Args:
        unet: float32, in evaluation mode; not changed.
        folder: Where they and their data file are written.
        image_size: Side of the stage's pictures in pixels.
        precision: What the graph computes in; inputs and output stay float32.
        dynamic_size: Leave height and width free, in multiples of the U-Net's size divisor.
        guided: Write the guided one.
        whole_norms: Keep each GroupNormalization one node: TensorRT has a layer for it.
        shallow: Write for each one of the finest level alone, too, over the same weights.

    Raises:
        ExportError: If a dimension meant to be free came out fixed.
    """
    if precision != "fp32":
        unet = copy.deepcopy(unet).to(DTYPES[precision])
    if precision == "bf16":
        unet.apply(_without_resize)
    config = unet.config
    sizes = {"opset": OPSETS[precision], "size": image_size, "divisor": config.size_divisor}
    takes, takes_guided = (
        denoiser_inputs(config, image_size, dynamic_size=dynamic_size, guided=each)
        for each in (False, True)
    )
    gives = denoiser_outputs(config, image_size, dynamic_size=dynamic_size, with_deep=shallow)
    plain, path = folder / graph_name(False), folder / graph_name(True)
    export_graph(
        PlainDenoiser(unet, with_deep=shallow), plain, takes, gives,
        data=f"{graph_name(guided)}.data",
        translations={} if whole_norms else {GROUP_NORM: group_norm_in_parts}, **sizes,
    )  # fmt: skip
    if guided:
        export_guided(plain, path, takes_guided, gives, **sizes)
    if shallow:
        export_shallow(plain, folder / graph_name(False, shallow=True), precision)
        if guided:
            export_shallow(path, folder / graph_name(True, shallow=True), precision)


class Twice(nn.Module):
    """Nearest neighbours at twice the side without ONNX's Resize.

    ONNX Runtime computes that on cards in float32 and float16, not in bfloat16
    (docs/OperatorKernels.md there, CUDAExecutionProvider).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2 H, 2 W)."""
        batch, channels, height, width = x.shape
        apart = x[:, :, :, None, :, None].expand(batch, channels, height, 2, width, 2)
        return apart.reshape(batch, channels, 2 * height, 2 * width)


def _without_resize(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Upsample):
            assert (child.scale_factor, child.mode) == (2.0, "nearest")
            setattr(module, name, Twice())


def export_conditioner(unet: UNet, path: Path) -> None:
    """Writes the text conditioner, in float32 whatever the denoiser's precision: it is small."""
    export_graph(
        Conditioner(unet), path,
        conditioner_inputs(unet.config), conditioner_outputs(unet.config),
        opset=OPSETS["fp32"], size=1, divisor=1,
    )  # fmt: skip


def check_fp16_range(unet: UNet, *, image_size: int, timesteps: int) -> None:
    """Refuses networks whose activations come near the end of float16's range.

    Args:
        unet: float32, in evaluation mode.
        image_size: Side of the stage's pictures in pixels.
        timesteps: Diffusion steps T; the first, middle and last time are tried.

    Raises:
        ExportError: Naming the layer, with what to do instead.
    """
    largest: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                peak = output.abs().max().nan_to_num(nan=float("inf")).item()
                largest[name] = max(largest.get(name, 0.0), peak)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in unet.named_modules()]
    ports = denoiser_inputs(unet.config, image_size, dynamic_size=False)
    inputs = example_inputs(ports, batch=EXAMPLE_BATCH, size=image_size)
    inputs["t"] = torch.tensor([0.0, timesteps // 2, timesteps - 1])
    del inputs["cond_scale"]
    null = unet.null_text(EXAMPLE_BATCH)
    inputs |= {"null_tokens": null.tokens, "null_hidden": null.hidden}
    try:
        with torch.no_grad():
            PlainDenoiser(unet)(*BothBranches()(**inputs))
    finally:
        for hook in hooks:
            hook.remove()
    name = max(largest, key=lambda name: largest[name])
    if largest[name] > FP16_LIMIT:
        raise ExportError(
            f"fp16: the activations of layer {name or 'output'!r} reach {largest[name]:.3g}, and "
            f"float16 ends at 65504 (refused above {FP16_LIMIT:.0f}). Use --precision bf16, which "
            f"has the range of float32, or --precision fp32."
        )
