"""OpenVINO's entry, one for a process; no torch."""

from functools import cache
from typing import Any


@cache
def core_of(openvino: Any) -> Any:
    """The package's `Core`, made once and kept to the end of the process.

    The CPU plug-in of each `Core` gives its thread a stack for signal handlers, and gives the one
    before it back when it goes. Two that do not go in reverse order leave the thread with a stack
    that is no more: the next signal, as of a child that ends, is a segmentation fault.

    Args:
        openvino: The imported package.
    """
    return openvino.Core()
