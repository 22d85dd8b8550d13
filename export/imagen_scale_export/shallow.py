"""A denoiser's graph of the finest level alone: cut out of the whole one, without tracing."""

from pathlib import Path
from typing import Any

from imagen_scale.sampling.runtimes.ports import Precision


def export_shallow(whole: Path, path: Path, precision: Precision) -> None:
    """Writes what follows in a denoiser from its inputs and the deeper levels' features.

    Args:
        whole: A denoiser's file in the same folder, which gives these features; its weights serve.
        path: The file to write.
        precision: What it computes in.
    """
    import onnx

    model = onnx.load(whole, load_external_data=False)
    cut(model, precision)
    onnx.save(model, path)
    onnx.checker.check_model(path)


def cut(model: Any, precision: Precision) -> None:
    """Makes the second output of a ModelProto an input; what nothing needs any more goes."""
    from onnx import TensorProto, helper

    graph = model.graph
    prediction, deep = graph.output
    features, nodes = deep.name, []
    if precision != "fp32":  # the output is a copy in float32 of what is computed with
        (copied,) = [node for node in graph.node if node.output[0] == deep.name]
        (features,) = copied.input
        kind = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16
        nodes = [helper.make_node("Cast", [deep.name], [features], to=kind)]
    needed, kept = {prediction.name}, []
    for node in reversed(graph.node):  # they stand in the order of computing
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(name for name in node.input if name != features)
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    shallow = helper.make_graph(
        [*nodes, *reversed(kept)], graph.name, [*graph.input, deep], [prediction], weights
    )
    graph.CopyFrom(shallow)
