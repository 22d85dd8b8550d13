"""One module to an ONNX file whose ports are named and whose free dimensions are free."""

import gc
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_scale.data.encoder import MAX_TOKENS
from imagen_scale.errors import ExportError, MissingExtraError
from imagen_scale.sampling.runtimes.ports import BATCH, HEIGHT, TOKENS, WIDTH, Port

PAIRS = "pairs"  # images of both branches of guidance: twice the batch
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
    lengths = {
        BATCH: batch, PAIRS: 2 * batch, HEIGHT: size, WIDTH: size, TOKENS: EXAMPLE_TOKENS
    }  # fmt: skip
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
    max_tokens: int = MAX_TOKENS,
    data: str | None = None,
    translations: Mapping[Any, Any] | None = None,
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
        max_tokens: Tokens of a caption, where they are free.
        data: Name of the file of weights; None is the file's own with `.data`.
        translations: Operators of torch to what makes their nodes, where it is not torch's way.

    Raises:
        ExportError: If a dimension meant to be free came out fixed.
    """
    import onnx
    import onnx_ir

    model = trace(
        module, inputs, opset=opset, size=size, divisor=divisor, max_tokens=max_tokens,
        translations=translations,
    )  # fmt: skip
    # torch's own `save` does nothing else, but for what it holds to be small.
    onnx_ir.save(model, path, external_data=data or f"{path.name}.data")
    finish(onnx.load(path, load_external_data=False), path, inputs, outputs)


def trace(
    module: nn.Module,
    inputs: Sequence[Port],
    *,
    opset: int,
    size: int,
    divisor: int,
    max_tokens: int = MAX_TOKENS,
    translations: Mapping[Any, Any] | None = None,
) -> Any:
    """One module as an onnx_ir.Model; arguments and errors are those of `export_graph`."""
    batch = torch.export.Dim(BATCH)
    free: dict[Any, Any] = {
        BATCH: batch,
        PAIRS: 2 * batch,
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
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=opset, verbose=False,
            custom_translation_table=dict(translations or {}),
        )  # fmt: skip
    assert exported is not None  # it is None only when a file name is given
    return exported.model


@contextmanager
def _uncollected() -> Iterator[None]:
    """Holds Python's collector: what it finalises while torch traces, torch takes into the graph.

    Calls that no module makes were found in a graph once, in a process that had trained before.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def finish(model: Any, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
    """Writes an onnx.ModelProto, checked, whose weights lie beside `path` already.

    Dimensions and outputs are named; what tells of the exporting machine is left out.
    """
    import onnx

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
