"""Graphs in OpenVINO, on the CPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagen_scale.data.storage import first_line
from imagen_scale.errors import ExportError, MissingExtraError, option
from imagen_scale.sampling.openvino_core import core_of
from imagen_scale.sampling.runtimes.executors import Backend, computing

# OpenVINO ---------------------------------------------------------------------------------------


class OpenVino:
    """A graph on OpenVINO's CPU plug-in.

    Args:
        path: A float32 ONNX file.
        bf16: Compute in bfloat16.
    """

    def __init__(self, path: Path, *, bf16: bool) -> None:
        self.path = path
        hints = {
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        try:
            self.model = core_of(import_openvino()).compile_model(path, "CPU", hints)
        except RuntimeError as error:
            raise ExportError(f"{path}: OpenVINO cannot load it: {first_line(error)}") from None
        self.device = torch.device("cpu")

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The graph's first output."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """All of them."""
        feed = {name: value.contiguous().numpy() for name, value in inputs.items()}
        with computing(f"OpenVINO, {self.path}"):
            found = self.model(feed)
            # Copies: the results lie in the request's own memory.
            return [torch.from_numpy(found[port].copy()) for port in self.model.outputs]

    def close(self) -> None:
        """Frees the compiled graph."""
        del self.model


def import_openvino() -> Any:
    """The openvino package, or MissingExtraError."""
    try:
        import openvino
    except ImportError:
        raise MissingExtraError(
            "the openvino runtime needs the package openvino; run pip install "
            "'imagen-scale[openvino]'."
        ) from None
    return openvino


def openvino_backend(folder: Path, *, bf16: bool) -> Backend:
    """An export on OpenVINO's CPU plug-in.

    Raises:
        ExportError: If its files are links, behind which OpenVINO reads no weights.
    """
    if linked := sorted(path.name for path in folder.iterdir() if path.is_symlink()):
        raise ExportError(
            f"{folder / linked[0]}: is a link, and OpenVINO reads no weights behind links. Copy "
            f"the export with `cp -rL`, or use {option('runtime')} onnx, which reads them."
        )
    version = import_openvino().__version__.split("-")[0]
    return Backend(
        f"openvino {version} ({'bf16' if bf16 else 'fp32'})",
        torch.device("cpu"),
        lambda name: OpenVino(folder / name, bf16=bf16),
    )
