"""What computes one exported graph: ONNX Runtime, OpenVINO or TensorRT.

An executor maps named float32 tensors on its device to the prediction, nothing more; text,
guidance and the noise schedule are bound to it in `runtimes`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from imagen_scale.data.storage import first_line
from imagen_scale.errors import CardProblem, EnvironmentProblem, ExportError, option
from imagen_scale.sampling.card_loss import card_lost, is_card_lost

_NO_MEMORY = ("failed to allocate memory", "out of memory", "bad_alloc", "bad allocation")


class Executor(Protocol):
    """Computes one graph."""

    device: torch.device

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The graph's first output, float32 on `device`; inputs as `ports` names them."""
        ...

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """All of them."""
        ...

    def close(self) -> None:
        """Frees what the graph holds."""
        ...


@contextmanager
def computing(what: str) -> Iterator[None]:
    """Turns whatever a library raises while it computes into what callers know.

    Args:
        what: Names the library and the graph.

    Raises:
        torch.OutOfMemoryError: If it found no memory; callers of torch's networks catch the same.
        CardProblem: If the card failed for good.
        ExportError: Otherwise.
    """
    try:
        yield
    except Exception as error:  # the libraries' errors share no base class
        if any(words in str(error).lower() for words in _NO_MEMORY):
            raise torch.OutOfMemoryError(f"{what}: {first_line(error)}") from None
        if isinstance(error, torch.AcceleratorError) or is_card_lost(str(error)):
            raise CardProblem(card_lost(what, first_line(error))) from None
        raise ExportError(f"{what} failed: {first_line(error)}") from None


class OnStream:
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

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The first alone: no other has a buffer here."""
        return [self(inputs)]

    def _output_shape(self, inputs: Mapping[str, Tensor]) -> torch.Size:
        return inputs["x_t"].shape  # networks predict noise or v: as many channels as they take

    def _bind(self) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        raise NotImplementedError


def require_driver(device: torch.device, runtime: str) -> None:
    """Raises EnvironmentProblem unless `device` is a CUDA device that torch can use."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"{option('runtime')} {runtime} on {device.type}: needs an NVIDIA card, its driver and "
            f"a CUDA build of torch, and torch finds none here. Use {option('runtime')} torch or "
            f"onnx on the CPU."
        )


# What opens them --------------------------------------------------------------------------------


class Backend(NamedTuple):
    """An export's graphs on a device, opened when they are needed.

    Making one proves that the device can be used, without loading the network.
    """

    name: str
    device: torch.device
    open: Callable[[str], Executor]  # by the graph's file
