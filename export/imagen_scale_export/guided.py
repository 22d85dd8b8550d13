"""The guided denoiser's graph: the plain denoiser's between two small ones.

Tracing a U-Net is most of an export's time, and guidance takes the same U-Net at twice the batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagen_scale.sampling.runtimes.ports import Port
from imagen_scale_export.graphs import BothBranches, Guidance
from imagen_scale_export.to_onnx import PAIRS, finish, trace

BEFORE, AFTER = "before/", "after/"


def export_guided(
    plain: Path, path: Path, inputs: Sequence[Port], outputs: Sequence[Port],
    *, opset: int, size: int, divisor: int,
) -> None:  # fmt: skip
    """Writes the guided denoiser over the weights of the plain one.

    Args:
        plain: The plain denoiser's file, in the same folder.
        path: The file to write.
        inputs: What it takes.
        outputs: What both give; the prediction first.
        opset: As for `export_graph`, as are the next two; the plain one's.
        size: Height and width of the example that is traced, where they are free.
        divisor: What free heights and widths are multiples of.
    """
    import onnx
    import onnx_ir

    scale = next(port for port in inputs if port.name == "cond_scale")
    pair = Port("pair", (PAIRS, *outputs[0].dims[1:]))
    before, after = (
        onnx_ir.to_proto(trace(module, ports, opset=opset, size=size, divisor=divisor))
        for module, ports in (
            (BothBranches(), [port for port in inputs if port is not scale]),
            (Guidance(), [pair, scale]),
        )
    )
    joined = join(before, onnx.load(plain, load_external_data=False), after)
    order = [port.name for port in inputs]
    ports = sorted(joined.graph.input, key=lambda port: order.index(port.name))
    del joined.graph.input[:]
    joined.graph.input.extend(ports)
    finish(joined, path, inputs, outputs)


def join(before: Any, plain: Any, after: Any) -> Any:
    """Runs three graphs one after the other.

    Args:
        before: ModelProto that gives the plain graph's inputs, in their order.
        plain: Likewise; its weights stay where they are.
        after: Takes its first output first, and what else it needs; the others are given as well.
    """
    from onnx import ModelProto
    from onnx.compose import merge_graphs

    taken, given = plain.graph.input, before.graph.output
    links = [(give.name, take.name) for give, take in zip(given, taken, strict=True)]
    graph = merge_graphs(before.graph, plain.graph, links, prefix1=BEFORE)
    link = (graph.output[0].name, after.graph.input[0].name)
    graph = merge_graphs(graph, after.graph, [link], prefix2=AFTER)

    # Told apart for the merge alone: the outside has the names that the plain graph had inside.
    ports = (*graph.input, *graph.output)
    names = {port.name: port.name.removeprefix(BEFORE).removeprefix(AFTER) for port in ports}
    names[plain.graph.output[0].name] = AFTER + after.graph.input[0].name
    for port in ports:
        port.name = names[port.name]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]

    joined = ModelProto()
    joined.CopyFrom(plain)
    joined.graph.CopyFrom(graph)
    *others, prediction = graph.output
    del joined.graph.output[:]
    joined.graph.output.extend([prediction, *others])
    return joined
