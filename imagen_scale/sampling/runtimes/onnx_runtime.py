"""Graphs in ONNX Runtime, on the CPU and on CUDA."""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagen_scale.data.storage import first_line
from imagen_scale.errors import EnvironmentProblem, ExportError, MissingExtraError, option
from imagen_scale.sampling.runtimes.executors import (
    Backend,
    OnStream,
    computing,
    require_driver,
)
from imagen_scale.sampling.runtimes.ports import CONDITIONER, LEAST_ONNXRUNTIME

# A node of these on the CPU while a GPU was asked for means a silent fallback: they compute, or
# copy, whole feature maps.
HEAVY_OPS = {
    "Attention", "Conv", "Gemm", "GroupNormalization", "InstanceNormalization",
    "LayerNormalization", "MatMul", "ReduceMean", "Resize", "Softmax",
}  # fmt: skip
LEAST_ON_CARDS = "1.27"  # earlier ones lack kernels of the graphs' opsets there


def import_onnxruntime() -> Any:
    """The onnxruntime package, new enough for what is exported.

    Raises:
        ExportError: If it is older.
        MissingExtraError: If it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when it is imported
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError(
            "the onnx runtime needs the package onnxruntime; run pip install "
            "'imagen-scale[export]', or 'imagen-scale[gpu]' for NVIDIA cards."
        ) from None
    if is_outdated(onnxruntime.__version__):
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} is installed, and exports need "
            f"{LEAST_ONNXRUNTIME} or later. Update it: pip install -U "
            f"'onnxruntime>={LEAST_ONNXRUNTIME}' (onnxruntime-gpu on NVIDIA cards), or take "
            f"{option('runtime')} torch."
        )
    return onnxruntime


def is_outdated(version: str, least: str = LEAST_ONNXRUNTIME) -> bool:
    """Whether an ONNX Runtime is older than exports need."""
    ours, theirs = (
        tuple(int(part) for part in re.findall(r"\d+", one)[:2]) for one in (version, least)
    )
    return ours < theirs


def _complaint(error: Exception) -> str:
    """What ONNX Runtime says of a file, without its own sources, and what to do about it."""
    text = first_line(error)
    if found := re.search(r"Unsupported model IR version.*|Opset \d+ is under development", text):
        return (
            f"{found[0].rstrip('. ')}: it was exported with newer packages. Update ONNX Runtime "
            f"(pip install -U onnxruntime), or export again here with --force."
        )
    return text


def onnx_session(path: Path, provider: str, options: dict[str, str] | None = None) -> Any:
    """A session that computes where it is told to.

    ONNX Runtime goes on with the CPU when a GPU cannot be used, and says so in a log line only.

    Args:
        path: ONNX file with its weights beside it.
        provider: E.g. "CUDAExecutionProvider".
        options: The provider's options.

    Raises:
        EnvironmentProblem: If another provider would compute it.
        ExportError: If ONNX Runtime is too old, or the file too new for it.
        MissingExtraError: If ONNX Runtime is not installed.
    """
    onnxruntime = import_onnxruntime()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = torch.get_num_threads()
    is_cpu = provider == "CPUExecutionProvider"
    if not is_cpu:
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the check below says it better
            session = onnxruntime.InferenceSession(
                path, settings, providers=[provider], provider_options=[options or {}]
            )
    except Exception as error:  # its errors share no base class
        raise ExportError(f"{path}: ONNX Runtime cannot load it: {_complaint(error)}") from None
    # Not `disable_cpu_ep_fallback`: it refuses every node on the CPU (onnxruntime pull request
    # 16016), and the shape arithmetic of a free batch belongs there.
    session.disable_fallback()
    if session.get_providers()[0] != provider:
        raise EnvironmentProblem(
            f"ONNX Runtime would compute {path.name} with {session.get_providers()[0]} instead of "
            f"{provider}. Install onnxruntime-gpu in place of onnxruntime, with a driver and CUDA "
            f"libraries that fit it, or use {option('runtime')} torch."
        )
    if not is_cpu:
        _refuse_heavy_nodes_elsewhere(session, provider)
    return session


def _refuse_heavy_nodes_elsewhere(session: Any, provider: str) -> None:
    # Shape arithmetic of the free batch belongs on the CPU; the network itself does not.
    stray = {
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
    } & HEAVY_OPS
    if stray:
        raise EnvironmentProblem(
            f"ONNX Runtime would compute {', '.join(sorted(stray))} on the CPU instead of with "
            f"{provider}. Use onnxruntime-gpu 1.27 or later, or {option('runtime')} torch."
        )


class OnnxCpu:
    """A graph on ONNX Runtime's CPU provider; tensors are handed over without a copy."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.session = onnx_session(path, "CPUExecutionProvider")
        self.device = torch.device("cpu")

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The graph's first output."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """All of them."""
        feed = {name: value.contiguous().numpy() for name, value in inputs.items()}
        with computing(f"ONNX Runtime, {self.path}"):
            return [torch.from_numpy(found) for found in self.session.run(None, feed)]

    def close(self) -> None:
        """Frees the session."""
        del self.session


def cuda_options(device: torch.device, stream: int) -> dict[str, str]:
    """What ONNX Runtime's CUDA provider is told.

    Its default is to round inputs of float32 products and convolutions to 10 bits (TF32), which
    moves a picture by more than an export may differ.

    Args:
        device: A CUDA device.
        stream: The stream to compute on, as a number.
    """
    return {
        "device_id": str(device.index or 0),
        "user_compute_stream": str(stream),
        "use_tf32": "0",
    }


class OnnxCuda(OnStream):
    """A graph on ONNX Runtime's CUDA provider, its inputs and output bound to torch's memory."""

    run_options: Any = None  # what each run is told

    def __init__(self, path: Path, device: torch.device) -> None:
        require_driver(device, "onnx")
        super().__init__(device)
        self.path = path
        options = cuda_options(device, self.stream.cuda_stream)
        self.session = onnx_session(path, "CUDAExecutionProvider", options)
        self.binding = self.session.io_binding()

    def _bind(self) -> None:
        import numpy as np

        self.binding = self.session.io_binding()
        index = self.device.index or 0
        for name, buffer in self.buffers.items():
            self.binding.bind_input(
                name, "cuda", index, np.float32, tuple(buffer.shape), buffer.data_ptr()
            )
        self.binding.bind_output(
            self.session.get_outputs()[0].name, "cuda", index, np.float32,
            tuple(self.output.shape), self.output.data_ptr(),
        )  # fmt: skip

    def _run(self) -> None:
        with computing(f"ONNX Runtime, {self.path}"):
            self.session.run_with_iobinding(self.binding, self.run_options)

    def close(self) -> None:
        """Frees the session and the buffers."""
        del self.session, self.binding
        self.buffers.clear()


def onnx_backend(folder: Path, device: torch.device) -> Backend:
    """An export on ONNX Runtime, on the CPU or on an NVIDIA card."""
    is_cpu = device.type == "cpu"
    if not is_cpu:
        require_driver(device, "onnx")
        version = import_onnxruntime().__version__
        if is_outdated(version, LEAST_ON_CARDS):
            raise EnvironmentProblem(
                f"ONNX Runtime {version} is installed, and cards need {LEAST_ON_CARDS} or later: "
                f"pip install -U 'onnxruntime-gpu>={LEAST_ON_CARDS}', or take "
                f"{option('runtime')} torch."
            )
    # The conditioner is small: it shows at once which provider computes.
    onnx_session(folder / CONDITIONER, f"{'CPU' if is_cpu else 'CUDA'}ExecutionProvider")
    version = import_onnxruntime().__version__
    return Backend(
        f"onnxruntime {version} ({'CPU' if is_cpu else 'CUDA'})",
        device,
        lambda name: OnnxCpu(folder / name) if is_cpu else OnnxCuda(folder / name, device),
    )
