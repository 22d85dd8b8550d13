"""A trained U-Net to ONNX files: the denoiser, with guidance and without, and the conditioner."""

import copy
import gc
import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_scale.data.encoder import MAX_TOKENS
from imagen_scale.errors import ExportError, MissingExtraError
from imagen_scale.models.unet import UNet
from imagen_scale.sampling.runtimes.executors import graph_name
from imagen_scale.sampling.runtimes.ports import (
    BATCH,
    HEIGHT,
    OPSETS,
    TOKENS,
    WIDTH,
    Port,
    Precision,
    conditioner_inputs,
    conditioner_outputs,
    denoiser_inputs,
    denoiser_output,
)
from imagen_scale_export.graphs import Conditioner, GuidedDenoiser, PlainDenoiser

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# Half of float16's range: what the calibration inputs reach, others may exceed.
FP16_LIMIT = 3e4
EXAMPLE_TOKENS = 7
EXAMPLE_BATCH = 3  # tracing at 1 would take a free batch for a fixed one


def require_exporter() -> None:
    """Raises MissingExtraError unless the exporter's packages are installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"exporting needs the package {error.name}; run pip install 'imagen-scale[export]'."
        ) from None


def export_denoisers(
    unet: UNet, folder: Path, *, image_size: int, precision: Precision, dynamic_size: bool,
    graphs: Sequence[bool] = (True, False),
) -> None:  # fmt: skip
    """Writes the guided denoiser and, over the same weights, the one for a guidance scale of 1.

    Args:
        unet: float32, in evaluation mode; not changed.
        folder: Where they and their data file are written.
        image_size: Side of the stage's pictures in pixels.
        precision: What the graph computes in; inputs and output stay float32.
        dynamic_size: Leave height and width free, in multiples of the U-Net's size divisor.
        graphs: Which of them: guided or not.

    Raises:
        ExportError: If a dimension meant to be free came out fixed.
    """
    if precision != "fp32":
        unet = copy.deepcopy(unet).to(DTYPES[precision])
    if precision == "bf16":
        unet.apply(_without_resize)
    config = unet.config
    output = denoiser_output(config, image_size, dynamic_size=dynamic_size)
    saved = None  # the first one's weights are the second one's
    for guided in graphs:
        module = GuidedDenoiser(unet) if guided else PlainDenoiser(unet)
        path = folder / graph_name(guided)
        inputs = denoiser_inputs(config, image_size, dynamic_size=dynamic_size, guided=guided)
        export_graph(
            module, path, inputs, [output],
            opset=OPSETS[precision], size=image_size, divisor=config.size_divisor,
            weights_of=saved,
        )  # fmt: skip
        saved = path


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
    null = unet.null_text(EXAMPLE_BATCH)
    inputs |= {"null_tokens": null.tokens, "null_hidden": null.hidden}
    try:
        with torch.no_grad():
            GuidedDenoiser(unet)(**inputs)
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


def example_inputs(
    ports: Sequence[Port], *, batch: int, size: int, seed: int = 0
) -> dict[str, Tensor]:
    """Random values for a graph's inputs: standard normal; times, scales and masks of their kind.

    Args:
        ports: The inputs.
        batch: Number of images.
        size: Height and width where they are free.
        seed: Same seed, same values.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = {BATCH: batch, HEIGHT: size, WIDTH: size, TOKENS: EXAMPLE_TOKENS}
    inputs = {}
    for port in ports:
        shape = [lengths[dim] if isinstance(dim, str) else dim for dim in port.dims]
        value = torch.randn(shape, generator=generator)
        if port.dtype == "bool":
            value = value > 0
        elif port.dtype == "int64":  # no token is left out, and every vocabulary has a second one
            value = torch.ones(shape, dtype=torch.int64)
        elif port.name in ("t", "lowres_t"):
            value = torch.arange(1.0, batch + 1)
        elif port.name == "cond_scale":
            value = torch.arange(float(batch))
        inputs[port.name] = value
    return inputs


def export_graph(
    module: nn.Module,
    path: Path,
    inputs: list[Port],
    outputs: list[Port],
    *,
    opset: int,
    size: int,
    divisor: int,
    weights_of: Path | None = None,
    max_tokens: int = MAX_TOKENS,
) -> None:
    """Writes one module as an ONNX file.

    Args:
        module: What the graph computes; its arguments have the names of the inputs.
        path: The file; its weights lie beside it.
        inputs: What it takes.
        outputs: What it gives.
        opset: Version of ONNX's operators.
        size: Height and width of the example that is traced, where they are free.
        divisor: What free heights and widths are multiples of.
        weights_of: A file beside it that holds the same weights already.
        max_tokens: Tokens of a caption, where they are free.

    Raises:
        ExportError: If a dimension meant to be free came out fixed.
    """
    free: dict[Any, Any] = {
        BATCH: torch.export.Dim(BATCH),
        TOKENS: torch.export.Dim(TOKENS, max=max_tokens),
        HEIGHT: divisor * torch.export.Dim("rows"),
        WIDTH: divisor * torch.export.Dim("columns"),
    }
    shapes = {
        port.name: {i: free[dim] for i, dim in enumerate(port.dims) if dim in free}
        for port in inputs
    }
    example = example_inputs(inputs, batch=EXAMPLE_BATCH, size=size)
    quiet = _quiet("torch.onnx", "onnxscript", "onnx_ir")
    with warnings.catch_warnings(), quiet, _uncollected():
        warnings.simplefilter("ignore")
        # Captured apart from the conversion: torch.onnx.export by itself would silently fix a
        # dimension that the module's code ties down, where this raises.
        try:
            program = torch.export.export(
                module.eval(), (), example, dynamic_shapes=shapes, strict=False
            )
        except torch._dynamo.exc.UserError as error:
            raise ExportError(
                f"the network ties an input dimension to the example's: {error}"
            ) from None
        exported = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
        assert exported is not None  # it is None only when a file name is given
        if weights_of:
            _save_sharing(exported.model, path, weights_of)
        else:
            exported.save(path, external_data=True)
    _finish(path, inputs, outputs)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Holds Python's collector: what it finalises while torch traces, torch takes into the graph.

    Calls that no module makes were found in a graph once, in a process that had trained before.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _save_sharing(model: Any, path: Path, saved: Path) -> None:
    """Saves a graph whose weights are references to those beside a saved one."""
    import onnx_ir

    def content(tensor: Any) -> tuple[Any, ...]:
        return tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()

    known = {
        content(value.const_value): value.const_value
        for value in onnx_ir.load(saved).graph.initializers.values()
        if isinstance(value.const_value, onnx_ir.ExternalTensor)
    }
    for value in model.graph.initializers.values():
        if same := known.get(content(value.const_value)):
            value.const_value = onnx_ir.ExternalTensor(
                same.location, same.offset, same.length, same.dtype,
                shape=same.shape, name=value.name or "", base_dir=saved.parent,
            )  # fmt: skip
    # torch's own `save` would write them once more where they are large.
    onnx_ir.save(model, path)


def _finish(path: Path, inputs: list[Port], outputs: list[Port]) -> None:
    """Names dimensions and outputs, strips what tells of the exporting machine, checks the file."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    _rename_outputs(graph, [port.name for port in outputs])
    for values, ports in ((graph.input, inputs), (graph.output, outputs)):
        if [value.name for value in values] != [port.name for port in ports]:
            raise ExportError(
                f"{path.name}: the graph has {[value.name for value in values]} where "
                f"{[port.name for port in ports]} was meant."
            )
        for value, port in zip(values, ports, strict=True):
            found = value.type.tensor_type.shape.dim
            for place, meant in zip(found, port.dims, strict=True):
                if isinstance(meant, str) != bool(place.dim_param):
                    raise ExportError(
                        f"{path.name}: dimension {meant!r} of {port.name} came out fixed at "
                        f"{place.dim_value}: the network's code reads it as a number."
                    )
                if isinstance(meant, str):
                    place.dim_param = meant
    # Shapes in between bear the old names of the dimensions; runtimes infer them again.
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.save(model, path)
    onnx.checker.check_model(path)


def _rename_outputs(graph: Any, names: list[str]) -> None:
    renamed = dict(zip((value.name for value in graph.output), names, strict=True))
    for value in graph.output:
        value.name = renamed[value.name]
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]


class _quiet:  # used as a statement
    """Keeps libraries' progress chatter off the terminal."""

    def __init__(self, *names: str) -> None:
        self._loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)


def op_census(path: Path) -> dict[str, int]:
    """How many nodes of each operator a file has."""
    import onnx

    counts: dict[str, int] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts
