"""Which runtime computes a U-Net: the one asked for, or with "auto" the best there is."""

import torch

from imagen_scale.errors import ImagenScaleError, UsageError, option
from imagen_scale.runs.inference import InferenceFile
from imagen_scale.sampling.runtimes.contract import Runtime, Say
from imagen_scale.sampling.runtimes.options import EXPORTED, RuntimeOptions
from imagen_scale.sampling.runtimes.torch_unet import TorchRuntime


def open_runtime(
    file: InferenceFile,
    device: torch.device,
    options: RuntimeOptions,
    *,
    side: int | None = None,
    caches: bool = False,
    say: Say = lambda sentence: None,
) -> Runtime:
    """Opens what computes a U-Net.

    Args:
        file: Its inference file. Exports lie beside it, in
            `export/unetN/<format>-<precision>/` of the run.
        device: Where to compute.
        options: "torch", "compile" (torch.compile; CUDA graphs on a card), an export ("onnx",
            "tensorrt", "openvino"), or "auto": the best that can be used, on the CPU onnx, then
            torch; on a card tensorrt, then torch.
        side: Pixels of the images it must take; None for the stage's own.
        caches: Whether it must reuse what earlier evaluations found.
        say: Told what "auto" chose, and why not the others.

    Raises:
        ImagenScaleError: If a runtime asked for by name cannot be used: there is no fallback.
    """
    if options.runtime == "auto":
        return _best_runtime(file, device, options, side, caches, say)
    if options.runtime in EXPORTED:
        return _open_export(options.runtime, file, device, options, side, caches)
    return TorchRuntime(file, device, options, say=say)


def _best_runtime(
    file: InferenceFile,
    device: torch.device,
    options: RuntimeOptions,
    side: int | None,
    caches: bool,
    say: Say,
) -> Runtime:
    wanted, name = ("tensorrt" if device.type == "cuda" else "onnx"), file.stage.name
    skipped = ""
    if options.channels_last or options.sequential:
        skipped = f"{wanted}: it takes neither {option('channels_last')} nor {option('sequential')}"
    else:
        try:
            runtime = _open_export(wanted, file, device, options, side, caches)
        except ImagenScaleError as error:
            skipped = f"{wanted}: {error.marked}"
        else:
            say(f"{name}: runtime {runtime.name}, the first choice here")
            return runtime
    fallback = TorchRuntime(file, device, options, say=say)
    say(f"{name}: runtime {fallback.name}; not {skipped}")
    return fallback


def _open_export(
    kind: str, file: InferenceFile, device: torch.device, options: RuntimeOptions,
    side: int | None, caches: bool,
) -> Runtime:  # fmt: skip
    if options.channels_last or options.sequential:
        raise UsageError(
            f"{option('runtime')} {kind}: takes neither {option('channels_last')} nor "
            f"{option('sequential')}."
        )
    from imagen_scale.sampling.runtimes import exported

    runtime = exported.open_exported(
        kind, file, folder=None, device=device, precision=options.precision
    )
    try:
        if side is not None:
            runtime.check_shape(torch.Size((1, file.config.imagen.channels, side, side)))
        if caches:
            runtime.check_cache()
    except ImagenScaleError:
        runtime.close()
        raise
    return runtime
