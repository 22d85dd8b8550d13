"""What runtimes on a card could be told beyond what sampling tells them, measured beside it.

Each is a context in which sessions are opened: nothing else of a line of part 4 differs. ONNX
Runtime's are options of its CUDA provider and of a run, TensorRT-RTX's are of its runtime config.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest.mock import patch

from imagen_scale.sampling.runtimes import onnx_runtime, tensorrt_rtx

_told = onnx_runtime.cuda_options


def _provider(**more: str) -> AbstractContextManager[object]:
    return patch.object(
        onnx_runtime, "cuda_options", lambda device, stream: _told(device, stream) | more
    )


def _unsynchronised() -> AbstractContextManager[object]:
    options = onnx_runtime.import_onnxruntime().RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return patch.object(onnx_runtime.OnnxCuda, "run_options", options)


def _captured() -> AbstractContextManager[object]:
    return patch.object(tensorrt_rtx.TensorRT, "cuda_graphs", True)


ONNX: dict[str, Callable[[], AbstractContextManager[object]]] = {
    # Refused where a graph has nodes on the CPU, as the shapes of a free batch are: it says so.
    "CUDA graphs": lambda: _provider(enable_cuda_graph="1"),
    "convolutions by heuristic": lambda: _provider(cudnn_conv_algo_search="HEURISTIC"),
    "memory as requested": lambda: _provider(arena_extend_strategy="kSameAsRequested"),
    "no wait after a run": _unsynchronised,
}
TENSORRT: dict[str, Callable[[], AbstractContextManager[object]]] = {"CUDA graphs": _captured}
SWITCHES = {"onnx": ONNX, "tensorrt": TENSORRT}
