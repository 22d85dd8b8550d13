"""What computes a U-Net while sampling: torch, or an export of it.

A runtime holds one U-Net. Prompts, guidance and the low-resolution picture are bound to it, and
what comes back is the `Denoiser` that every sampler takes.
"""

import torch

from imagen_scale.errors import ImagenScaleError, UsageError
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.runtimes.contract import (
    EXPORTED,
    Options,
    Runtime,
    RuntimeName,
    Say,
    no_negative_prompt,
)
from imagen_scale.sampling.runtimes.torch_unet import TorchRuntime


def open_runtime(
    name: RuntimeName,
    file: InferenceFile,
    *,
    device: torch.device,
    options: Options = Options(),  # noqa: B008  # immutable
    side: int | None = None,
    negative: bool = False,
    say: Say = lambda sentence: None,
) -> Runtime:
    """Opens what computes a U-Net.

    Args:
        name: "torch", "compile" (torch.compile; CUDA graphs on a card), an export ("onnx",
            "tensorrt", "openvino"), or "auto": the best that can be used, on the CPU onnx, then
            torch; on a card tensorrt, then torch.
        file: Its inference file. Exports lie beside it, in
            `export/unetN/<format>-<precision>/` of the run.
        device: Where to compute.
        options: How to compute.
        side: Pixels of the images it must take; None for the stage's own.
        negative: Whether it must take a negative prompt, which exports cannot.
        say: Told what "auto" chose, and why not the others.

    Raises:
        ImagenScaleError: If a runtime asked for by name cannot be used: there is no fallback.
    """
    if name == "auto":
        return _best_runtime(file, device, options, side, negative, say)
    if name in EXPORTED:
        if negative:
            raise no_negative_prompt(f"--runtime {name}")
        return _open_export(name, file, device, options, side)
    return TorchRuntime(file, device, options, compiled=name == "compile", say=say)


def _best_runtime(
    file: InferenceFile,
    device: torch.device,
    options: Options,
    side: int | None,
    negative: bool,
    say: Say,
) -> Runtime:
    wanted = "tensorrt" if device.type == "cuda" else "onnx"
    skipped = ""
    if options.channels_last or options.sequential:
        skipped = f"{wanted}: it takes neither --channels-last nor --sequential"
    elif negative:
        skipped = f"{wanted}: its graphs take no --negative-prompt"
    else:
        try:
            runtime = _open_export(wanted, file, device, options, side)
        except ImagenScaleError as error:
            skipped = f"{wanted}: {error}"
        else:
            say(f"U-Net {file.unet_number}: runtime {runtime.name}, the first choice here")
            return runtime
    fallback = TorchRuntime(file, device, options, say=say)
    say(f"U-Net {file.unet_number}: runtime {fallback.name}; not {skipped}")
    return fallback


def _open_export(
    kind: str, file: InferenceFile, device: torch.device, options: Options, side: int | None
) -> Runtime:
    if options.channels_last or options.sequential:
        raise UsageError(f"--runtime {kind}: takes neither --channels-last nor --sequential.")
    from imagen_scale.sampling.runtimes import exported

    runtime = exported.open_runtime(
        kind, file, folder=None, device=device, precision=options.precision
    )
    if side is not None:
        shape = torch.Size((1, file.config.imagen.channels, side, side))
        try:
            runtime.check_shape(shape)
        except ImagenScaleError:
            runtime.close()
            raise
    return runtime
