"""What computes a graph: ONNX Runtime with any provider that it has, or OpenVINO."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from .errors import (
    CardProblem,
    EnvironmentProblem,
    ExportError,
    MissingExtraError,
    UsageError,
    option,
)
from .sampling.card_loss import card_lost, is_card_lost
from .sampling.openvino_core import core_of

Runtime = Literal["onnx", "openvino"]
CPU = "CPUExecutionProvider"


class Graph(Protocol):
    """A loaded graph."""

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Its outputs, in order."""
        ...


class Engine(NamedTuple):
    """Where graphs are computed.

    Attributes:
        runtime: "onnx" or "openvino".
        provider: Of ONNX Runtime, e.g. "CUDAExecutionProvider".
        provider_options: For it, as ONNX Runtime takes them.
        threads: On the CPU; 0 leaves their number to the runtime.
    """

    runtime: Runtime = "onnx"
    provider: str = CPU
    provider_options: Mapping[str, str] = {}
    threads: int = 0

    def check(self) -> None:
        """Refuses what is not installed, before any work.

        Raises:
            UsageError: Naming the option and what is allowed.
            MissingExtraError: With the command that installs it.
        """
        if self.runtime not in get_args(Runtime):
            raise UsageError(
                f"{option('runtime')} {self.runtime}: take one of {', '.join(get_args(Runtime))}."
            )
        if self.threads < 0:
            raise UsageError(f"{option('threads')} {self.threads}: must be 0 or more.")
        if self.runtime == "openvino":
            if self.provider != CPU:
                raise UsageError(
                    f"{option('provider')} {self.provider}: goes with {option('runtime')} onnx."
                )
            _openvino()
            return
        found = _onnxruntime().get_available_providers()
        if self.provider not in found:
            raise UsageError(
                f"{option('provider')} {self.provider}: this ONNX Runtime has {', '.join(found)}. "
                f"Install the one that has it, e.g. onnxruntime-gpu for CUDAExecutionProvider."
            )

    def open(self, path: Path) -> Graph:
        """Loads a graph.

        Raises:
            ExportError: If the runtime cannot read it.
            EnvironmentProblem: If another provider would compute it.
        """
        try:
            return self._openvino(path) if self.runtime == "openvino" else self._onnx(path)
        except (EnvironmentProblem, MissingExtraError):
            raise
        except Exception as error:  # their errors share no base class
            raise ExportError(
                f"{path}: {self.runtime} cannot load it: {_first_line(error)}. Update the runtime, "
                f"or export the bundle with another precision."
            ) from None

    def _onnx(self, path: Path) -> Graph:
        onnxruntime = _onnxruntime()
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = self.threads
        # Without its arena, memory is given back between two graphs; it costs no time that shows.
        settings.enable_cpu_mem_arena = False
        session = onnxruntime.InferenceSession(
            path, settings, providers=[self.provider],
            provider_options=[dict(self.provider_options)],
        )  # fmt: skip
        session.disable_fallback()
        if session.get_providers()[0] != self.provider:
            raise EnvironmentProblem(
                f"ONNX Runtime would compute {path.name} with {session.get_providers()[0]} instead "
                f"of {self.provider}: its driver or its libraries do not fit."
            )

        def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            with _computing(path):
                outputs: list[np.ndarray] = session.run(None, dict(inputs))
                return outputs

        return run

    def _openvino(self, path: Path) -> Graph:
        # Its own choice may be less precise than the graph.
        config = {"INFERENCE_PRECISION_HINT": "f32"}
        if self.threads:
            config["INFERENCE_NUM_THREADS"] = str(self.threads)
        compiled = core_of(_openvino()).compile_model(str(path), "CPU", config)

        def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            with _computing(path):
                found = compiled(dict(inputs))
                return [np.array(found[port]) for port in compiled.outputs]

        return run


@contextmanager
def _computing(path: Path) -> Iterator[None]:
    """Makes the runtimes' errors ours."""
    try:
        yield
    except Exception as error:
        reason = _first_line(error)
        if is_card_lost(str(error)):
            raise CardProblem(card_lost(str(path), reason)) from None
        if isinstance(error, MemoryError) or re.search(r"alloc|out of memory", reason, re.I):
            raise EnvironmentProblem(
                f"{path}: memory is too small ({reason}). Make fewer pictures at once "
                f"({option('at_once')} 1)."
            ) from None
        raise ExportError(f"{path}: cannot be computed: {reason}") from None


def _onnxruntime() -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when it is imported
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError(
            "the package onnxruntime is missing; run pip install onnxruntime, or onnxruntime-gpu "
            "for NVIDIA cards."
        ) from None
    return onnxruntime


def _openvino() -> Any:
    try:
        import openvino
    except ImportError:
        raise MissingExtraError(
            "the package openvino is missing; run pip install 'imagen-scale-runtime[openvino]'."
        ) from None
    return openvino


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
