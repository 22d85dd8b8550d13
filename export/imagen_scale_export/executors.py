"""What computes one exported graph: ONNX Runtime, OpenVINO or TensorRT.

An executor maps named float32 tensors on its device to the prediction, nothing more; text,
guidance and the noise schedule are bound to it in `runtimes`.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from imagen_scale.errors import EnvironmentProblem, ExportError, MissingExtraError
from imagen_scale_export import built_here
from imagen_scale_export.manifest import (
    ENGINE,
    UNGUIDED_ENGINE,
    EngineFacts,
    onnx_sha256,
    sha256,
)
from imagen_scale_export.to_onnx import CONDITIONER, DENOISER, UNGUIDED
from imagen_scale_export.to_tensorrt import find_library, make_logger

# A node of these on the CPU while a GPU was asked for means a silent fallback.
HEAVY_OPS = {"Attention", "Conv", "Gemm", "GroupNormalization", "LayerNormalization", "MatMul"}


class Executor(Protocol):
    """Computes one graph."""

    device: torch.device

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The graph's first output, float32 on `device`; inputs as `io_spec` names them."""
        ...

    def close(self) -> None:
        """Frees what the graph holds."""
        ...


# ONNX Runtime -----------------------------------------------------------------------------------


def onnx_session(path: Path, provider: str, options: dict[str, str] | None = None) -> Any:
    """A session that computes where it is told to.

    ONNX Runtime goes on with the CPU when a GPU cannot be used, and says so in a log line only.

    Args:
        path: ONNX file with its weights beside it.
        provider: E.g. "CUDAExecutionProvider".
        options: The provider's options.

    Raises:
        EnvironmentProblem: If another provider would compute it.
        MissingExtraError: If ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError(
            "the onnx runtime needs the package onnxruntime; run pip install "
            "'imagen-scale[export]', or 'imagen-scale[gpu]' for NVIDIA cards."
        ) from None
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
        raise ExportError(f"{path}: ONNX Runtime cannot load it: {_first_line(error)}") from None
    session.disable_fallback()
    if session.get_providers()[0] != provider:
        raise EnvironmentProblem(
            f"ONNX Runtime would compute {path.name} with {session.get_providers()[0]} instead of "
            f"{provider}. Install onnxruntime-gpu in place of onnxruntime, with a driver and CUDA "
            f"libraries that fit it, or use --runtime torch."
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
            f"{provider}. Use onnxruntime-gpu 1.27 or later, or --runtime torch."
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


class OnnxCpu:
    """A graph on ONNX Runtime's CPU provider; tensors are handed over without a copy."""

    def __init__(self, path: Path) -> None:
        self.session = onnx_session(path, "CPUExecutionProvider")
        self.device = torch.device("cpu")

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The graph's first output."""
        feed = {name: value.contiguous().numpy() for name, value in inputs.items()}
        return torch.from_numpy(self.session.run(None, feed)[0])

    def close(self) -> None:
        """Frees the session."""
        del self.session


class _OnStream:
    """A graph on a CUDA stream of its own, with buffers that are allocated once per shape.

    The order of streams is kept here: the graph starts after what the caller has queued, and the
    caller goes on after the graph.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.buffers: dict[str, Tensor] = {}
        self.output = torch.empty(0, device=device)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The graph's first output."""
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            if any(
                name not in self.buffers or self.buffers[name].shape != value.shape
                for name, value in inputs.items()
            ):
                self.buffers = {
                    name: torch.empty(value.shape, dtype=value.dtype, device=self.device)
                    for name, value in inputs.items()
                }
                self.output = torch.empty(self._output_shape(inputs), device=self.device)
                self._bind()
            for name, value in inputs.items():
                self.buffers[name].copy_(value)
            self._run()
            # The sampler keeps predictions; the buffer is overwritten at the next step.
            prediction = self.output.clone()
        caller.wait_stream(self.stream)
        prediction.record_stream(caller)
        return prediction

    def _output_shape(self, inputs: Mapping[str, Tensor]) -> torch.Size:
        return inputs["x_t"].shape  # networks predict noise or v: as many channels as they take

    def _bind(self) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        raise NotImplementedError


class OnnxCuda(_OnStream):
    """A graph on ONNX Runtime's CUDA provider, its inputs and output bound to torch's memory."""

    def __init__(self, path: Path, device: torch.device) -> None:
        require_driver(device, "onnx")
        super().__init__(device)
        options = {
            "device_id": str(device.index or 0),
            "user_compute_stream": str(self.stream.cuda_stream),
        }
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
        self.session.run_with_iobinding(self.binding)

    def close(self) -> None:
        """Frees the session and the buffers."""
        del self.session, self.binding
        self.buffers.clear()


# OpenVINO ---------------------------------------------------------------------------------------


class OpenVino:
    """A graph on OpenVINO's CPU plug-in.

    Args:
        path: A float32 ONNX file.
        bf16: Compute in bfloat16.
    """

    def __init__(self, path: Path, *, bf16: bool) -> None:
        openvino = import_openvino()
        hints = {
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        try:
            self.model = openvino.Core().compile_model(path, "CPU", hints)
        except RuntimeError as error:
            raise ExportError(f"{path}: OpenVINO cannot load it: {_first_line(error)}") from None
        self.device = torch.device("cpu")

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The graph's first output."""
        feed = {name: value.contiguous().numpy() for name, value in inputs.items()}
        # A copy: the result lies in the request's own memory.
        return torch.from_numpy(self.model(feed)[0].copy())

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


# TensorRT ---------------------------------------------------------------------------------------


class TensorRT(_OnStream):
    """A TensorRT engine that was built on this machine.

    Args:
        path: The engine; `check_engine` has approved of its folder.
        facts: From its manifest.
        device: A CUDA device.

    Raises:
        EnvironmentProblem: Without an NVIDIA driver, or if the card is not one of the targets.
    """

    def __init__(self, path: Path, facts: EngineFacts, device: torch.device) -> None:
        require_driver(device, "tensorrt")
        library = find_library(facts.library)
        super().__init__(device)
        trt, self.path, self.facts = library.module, path, facts
        self._log = make_logger(trt)
        self._runtime = trt.Runtime(self._log)
        with torch.cuda.device(device):
            self.engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self.engine is None:
                raise EnvironmentProblem(
                    f"{path}: cannot be used on {torch.cuda.get_device_name(device)}: "
                    f"{self._log.errors[-1] if self._log.errors else 'no reason given'}. Build it "
                    f"again for this card with `imagen-scale export --format tensorrt --force`."
                )
            self.context = self._make_context(library.name)
            if self.context is None:
                raise EnvironmentProblem(
                    f"{path}: does not fit into the memory of {torch.cuda.get_device_name(device)}."
                    f" Free some, or build it for fewer images at once with --batch."
                )

    def _make_context(self, library: str) -> Any:
        self._cache = None
        if library != "tensorrt_rtx":  # only TensorRT-RTX compiles kernels at first use
            return self.engine.create_execution_context()
        config = self.engine.create_runtime_config()
        self._cache = config.create_runtime_cache()
        path = self.path.with_suffix(".cache")
        if path.is_file() and built_here.is_built_here(self.facts, path.name, sha256(path)):
            self._cache.deserialize(path.read_bytes())  # refuses by itself what does not fit
        config.set_runtime_cache(self._cache)
        return self.engine.create_execution_context(config)

    def _bind(self) -> None:
        for name, buffer in self.buffers.items():
            if not self.context.set_input_shape(name, tuple(buffer.shape)):
                raise ExportError(
                    f"{self.path}: {name} cannot have shape {tuple(buffer.shape)}; "
                    f"the range was fixed by --batch when it was built."
                )
            self.context.set_tensor_address(name, buffer.data_ptr())
        self.context.set_tensor_address("prediction", self.output.data_ptr())

    def _run(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise ExportError(f"{self.path}: failed: {'; '.join(self._log.errors[-1:])}")

    def close(self) -> None:
        """Keeps the kernels compiled so far beside the engine, then frees it."""
        self.stream.synchronize()
        if self._cache is not None:
            path = self.path.with_suffix(".cache")
            with suppress(OSError):  # a folder that may not be written costs time only
                temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
                temporary.write_bytes(bytes(memoryview(self._cache.serialize())))
                temporary.replace(path)
                built_here.remember(self.facts, path.name, sha256(path))
        del self.context, self.engine, self._runtime
        self.buffers.clear()


def check_engine(folder: Path, facts: EngineFacts) -> None:
    """Checks, without loading them, that an export's engines may be loaded here.

    Raises:
        ExportError: If it belongs to another graph or version, or was not built here.
        MissingExtraError: If its library is not installed.
    """
    again = "Build it again with `imagen-scale export --format tensorrt --force`."
    if facts.onnx_sha256 != onnx_sha256(folder):
        raise ExportError(f"{folder / ENGINE}: was built from another {DENOISER}. {again}")
    library = find_library(facts.library)
    if facts.version != library.version:
        raise ExportError(
            f"{folder / ENGINE}: was built by {library.name} {facts.version} and {library.version} "
            f"is installed; engines fit one version only. {again}"
        )
    for name in (ENGINE, UNGUIDED_ENGINE):
        if not built_here.is_built_here(facts, name, sha256(folder / name)):
            raise ExportError(
                f"{folder / name}: was not built on this machine by this user. An engine is "
                f"machine code, so a foreign one is not run. {again}"
            )


def require_driver(device: torch.device, runtime: str) -> None:
    """Raises EnvironmentProblem unless `device` is a CUDA device that torch can use."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"--runtime {runtime} on {device.type}: needs an NVIDIA card, its driver and a CUDA "
            f"build of torch, and torch finds none here. Use --runtime torch or onnx on the CPU."
        )


# What opens them --------------------------------------------------------------------------------


class Backend(NamedTuple):
    """An export's graphs on a device, opened when they are needed.

    Making one proves that the device can be used, without loading the network.
    """

    name: str
    device: torch.device
    open: Callable[[bool], Executor]  # guided or not


def onnx_backend(folder: Path, device: torch.device) -> Backend:
    """An export on ONNX Runtime, on the CPU or on an NVIDIA card."""
    is_cpu = device.type == "cpu"
    if not is_cpu:
        require_driver(device, "onnx")
    # The conditioner is small: it shows at once which provider computes.
    onnx_session(folder / CONDITIONER, f"{'CPU' if is_cpu else 'CUDA'}ExecutionProvider")
    import onnxruntime

    return Backend(
        f"onnxruntime {onnxruntime.__version__} ({'CPU' if is_cpu else 'CUDA'})",
        device,
        lambda guided: (
            OnnxCpu(folder / graph_name(guided))
            if is_cpu
            else OnnxCuda(folder / graph_name(guided), device)
        ),
    )


def openvino_backend(folder: Path, *, bf16: bool) -> Backend:
    """An export on OpenVINO's CPU plug-in."""
    version = import_openvino().__version__.split("-")[0]
    return Backend(
        f"openvino {version} ({'bf16' if bf16 else 'fp32'})",
        torch.device("cpu"),
        lambda guided: OpenVino(folder / graph_name(guided), bf16=bf16),
    )


def tensorrt_backend(folder: Path, facts: EngineFacts, device: torch.device) -> Backend:
    """An export's engines on an NVIDIA card."""
    require_driver(device, "tensorrt")
    check_engine(folder, facts)
    return Backend(
        f"{facts.library} {facts.version}",
        device,
        lambda guided: TensorRT(folder / (ENGINE if guided else UNGUIDED_ENGINE), facts, device),
    )


def graph_name(guided: bool) -> str:
    """File of the denoiser with guidance or without."""
    return DENOISER if guided else UNGUIDED
