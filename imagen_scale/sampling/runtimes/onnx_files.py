"""What an ONNX file says of itself, read without its weights."""

import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

_FLOATS = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
_DTYPES = {"FLOAT": "float32", "BOOL": "bool"}


class PortOfFile(NamedTuple):
    """One input or output; a free dimension stands by name."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


class Description(NamedTuple):
    """The outside of a graph."""

    inputs: list[PortOfFile]
    outputs: list[PortOfFile]
    precision: str | None  # of most of its weights: "fp32", "fp16" or "bf16"
    data_files: set[str]  # that it takes weights from, as it writes their names


def describe(path: Path) -> Description:
    """Reads an ONNX file."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph

    def ports(values: Any) -> list[PortOfFile]:
        found = []
        for value in values:
            kind = value.type.tensor_type
            dims = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
            name = onnx.TensorProto.DataType.Name(kind.elem_type)
            found.append(PortOfFile(value.name, _DTYPES.get(name, name), dims))
        return found

    kinds: Counter[str] = Counter()
    for tensor in graph.initializer:
        kinds[onnx.TensorProto.DataType.Name(tensor.data_type)] += math.prod(tensor.dims)
    floats = [kind for kind, _ in kinds.most_common() if kind in _FLOATS]
    precision = _FLOATS[floats[0]] if floats else None
    return Description(ports(graph.input), ports(graph.output), precision, _data_files(model))


def data_files(path: Path) -> set[str]:
    """Names of the files that an ONNX file takes its weights from, as it writes them."""
    return describe(path).data_files


def _data_files(model: Any) -> set[str]:
    from onnx.external_data_helper import (
        ExternalDataInfo,
        _get_all_tensors,  # those inside nodes and subgraphs as well
        uses_external_data,
    )

    tensors = _get_all_tensors(model)
    return {ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)}
