"""A bundle as a model repository of NVIDIA's Triton server: one model for each graph."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from imagen_scale.errors import ExportError, UsageError
from imagen_scale.files.atomic import sha256
from imagen_scale.sampling.runtimes.bundle import TEXT_ENCODER, Bundle, read_bundle
from imagen_scale.sampling.runtimes.manifest import Graph, PortRecord
from imagen_scale.sampling.runtimes.onnx_files import data_files
from imagen_scale.sampling.runtimes.ports import CONDITIONER, DENOISER, UNGUIDED

TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "bool": "TYPE_BOOL"}


class Model(NamedTuple):
    """One graph as Triton sees it."""

    name: str
    graph: Graph
    path: Path  # of the ONNX file


def write_repository(folder: Path, repository: Path, max_batch: int) -> list[str]:
    """Writes `NAME/config.pbtxt` and `NAME/1/` for each graph of a bundle.

    Files are hard links where the file system has them, else copies.

    Args:
        folder: The bundle's.
        repository: Made; must not be there yet.
        max_batch: Pictures that a model takes at once.

    Returns:
        The models' names.

    Raises:
        ExportError: If the bundle is not whole.
        UsageError: If the repository is there already.
    """
    bundle = read_bundle(folder)
    for name, record in bundle.files.items():
        if not (folder / name).is_file() or sha256(folder / name) != record.sha256:
            raise ExportError(f"{folder / name}: is not what was exported; export it again.")
    if repository.exists():
        raise UsageError(f"{repository}: exists already; name another folder.")
    models = list(_models(folder, bundle))
    for model in models:
        version = repository / model.name / "1"
        version.mkdir(parents=True)
        for name in (model.path.name, *data_files(model.path)):
            _link(model.path.with_name(name), version / name)
        config = repository / model.name / "config.pbtxt"
        config.write_text(config_of(model, max_batch), encoding="utf-8")
    return [model.name for model in models]


def config_of(model: Model, max_batch: int) -> str:
    """`config.pbtxt` of a model.

    Source: ModelConfig in triton-inference-server/common, protobuf/model_config.proto.
    """
    kinds = ("input", model.graph.inputs), ("output", model.graph.outputs)
    ports = "".join(
        f"{kind} [\n" + ",\n".join(map(_port, of_kind)) + "\n]\n" for kind, of_kind in kinds
    )
    return (
        f'name: "{model.name}"\n'
        f'backend: "onnxruntime"\n'
        f'default_model_filename: "{model.path.name}"\n'
        f"max_batch_size: {max_batch}\n"
        f"{ports}"
        f"dynamic_batching {{ }}\n"
    )


def _models(folder: Path, bundle: Bundle) -> Iterator[Model]:
    yield Model("text_encoder", bundle.text.graph, folder / TEXT_ENCODER)
    for stage in bundle.stages:
        for graph, name in (
            (stage.conditioner, CONDITIONER),
            (stage.denoiser, DENOISER),
            (stage.denoiser_unguided, UNGUIDED),
        ):
            if graph is not None:
                path = folder / stage.folder / name
                yield Model(f"{stage.folder}_{path.stem}", graph, path)


def _port(port: PortRecord) -> str:
    """An input or output; its first dimension is the batch, which Triton adds by itself."""
    sides = [dim if isinstance(dim, int) else -1 for dim in port.dims[1:]]
    # A number for each picture: Triton has no empty dims.
    dims = f"dims: {sides}" if sides else "dims: [1], reshape: { shape: [] }"
    return f'  {{ name: "{port.name}", data_type: {TYPES[port.dtype]}, {dims} }}'


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, to)
