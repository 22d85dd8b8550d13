"""Engines in TensorRT-RTX."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from imagen_scale.errors import EnvironmentProblem, ExportError
from imagen_scale.files.atomic import sha256, temporary_path
from imagen_scale.sampling.runtimes import built_here
from imagen_scale.sampling.runtimes.executors import Backend, OnStream, require_driver
from imagen_scale.sampling.runtimes.manifest import (
    ENGINE,
    UNGUIDED_ENGINE,
    EngineFacts,
    onnx_sha256,
)
from imagen_scale.sampling.runtimes.ports import DENOISER, UNGUIDED
from imagen_scale.sampling.runtimes.tensorrt_library import Library, find_library, make_logger

# TensorRT ---------------------------------------------------------------------------------------


class TensorRT(OnStream):
    """A TensorRT engine that was built on this machine.

    Args:
        path: The engine; `check_engine` has approved of its folder.
        facts: From its manifest.
        device: A CUDA device.

    Raises:
        EnvironmentProblem: Without an NVIDIA driver, or if the card is not one of the targets.
    """

    cuda_graphs = False  # of TensorRT-RTX: not before a card has shown that they are worth it

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
            self.context = self._make_context(library)
            if self.context is None:
                raise EnvironmentProblem(
                    f"{path}: does not fit into the memory of {torch.cuda.get_device_name(device)}."
                    f" Free some, or build it for fewer images at once with --batch."
                )

    def _make_context(self, library: Library) -> Any:
        self._cache = None
        if library.name != "tensorrt_rtx":  # only TensorRT-RTX compiles kernels at first use
            return self.engine.create_execution_context()
        config = self.engine.create_runtime_config()
        self._cache = config.create_runtime_cache()
        path = self.path.with_suffix(".cache")
        if path.is_file() and built_here.is_built_here(self.facts, path.name, sha256(path)):
            self._cache.deserialize(path.read_bytes())  # refuses by itself what does not fit
        config.set_runtime_cache(self._cache)
        if self.cuda_graphs:
            config.cuda_graph_strategy = library.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
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
            with suppress(
                OSError, EnvironmentProblem
            ):  # a folder that may not be written costs time only
                temporary = temporary_path(path)
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
    for graph, name in ((DENOISER, ENGINE), (UNGUIDED, UNGUIDED_ENGINE)):
        if not (folder / graph).is_file():  # of few steps, whose guidance is built in
            continue
        if not built_here.is_built_here(facts, name, sha256(folder / name)):
            raise ExportError(
                f"{folder / name}: was not built on this machine by this user. An engine is "
                f"machine code, so a foreign one is not run. {again}"
            )


def tensorrt_backend(folder: Path, facts: EngineFacts, device: torch.device) -> Backend:
    """An export's engines on an NVIDIA card."""
    require_driver(device, "tensorrt")
    check_engine(folder, facts)
    return Backend(
        f"{facts.library} {facts.version}",
        device,
        lambda name: TensorRT((folder / name).with_suffix(".engine"), facts, device),
    )
