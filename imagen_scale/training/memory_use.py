"""Memory that training really uses: running out of it, and comparing it with the plan."""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from imagen_scale.config import StageConfig
from imagen_scale.planning.cache import cached_measure
from imagen_scale.planning.cost import process_bytes, step_cost
from imagen_scale.planning.machine import keep_calibration, this_machine
from imagen_scale.planning.planner import teacher_forward
from imagen_scale.planning.setup import Setup
from imagen_scale.planning.words import gb

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
# What is said when there is no more: torch's allocator on the CPU, CUDA outside torch's own, cuBLAS
# and cuDNN 8 and 9 for what they allocate themselves. torch passes over each of cuDNN's ways to
# compute a convolution whose workspace does not fit (ATen/native/cudnn/Conv_v8.cpp, try_plans) and
# then says that it found none. A bare CUDNN_STATUS_INTERNAL_ERROR may be anything.
_FULL = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm to run convolution",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that the card's or the host's memory is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)


def release_memory() -> None:
    """Gives back what is no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def return_freed_host_memory() -> None:
    """Makes the C library give freed blocks of 1 MB and more back to the system at once.

    glibc raises this limit to 32 MB as blocks are freed. Below it they come from heaps, whose holes
    stay resident: ZeRO-3, which gathers and frees weights all the time, took 20 to 30 % more than
    its tensors. Does nothing where the C library has no such limit.
    """
    with contextlib.suppress(AttributeError, OSError):  # musl, macOS; Windows
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def host_bytes() -> int:
    """Resident memory of this process now."""
    import psutil

    return psutil.Process().memory_info().rss


def forget_peaks() -> None:
    """Starts new peaks from what is in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux only; elsewhere the peak of the whole run stays
        Path("/proc/self/clear_refs").write_text("5")


def peak_host_bytes() -> int:
    """Most resident memory of this process since `forget_peaks`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_plan(stage: StageConfig, setup: Setup, baseline: int, say: Callable[[str], None]) -> None:
    """Says what was predicted and what is used, and keeps the ratio for the next plan.

    Args:
        stage: The U-Net.
        setup: In force.
        baseline: Host memory of this process before the U-Net was built.
        say: Told the figures.
    """
    activations = cached_measure(
        stage,
        micro_batch=setup.micro_batch,
        precision=setup.precision,
        checkpointing=setup.checkpointing,
        offload_activations=setup.offload_activations,
    )
    on_card = torch.cuda.is_available()
    cost = step_cost(
        setup, activations, on_card=on_card, profiles=len(stage.training.ema_widths),
        teacher_forward=teacher_forward(stage, setup),
    )  # fmt: skip
    host = cost.host / setup.ranks - process_bytes(on_card=on_card)
    measured_host = peak_host_bytes() - baseline
    where = f"plan check, {stage.name}"
    if not on_card:
        predicted = cost.card + host
        say(
            f"{where}: {gb(predicted)} predicted, {gb(measured_host)} measured, ratio "
            f"{measured_host / predicted:.3f} (no card: everything is host memory)"
        )
        return
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    total, free = _used_outside(reserved)
    ratio = total / cost.card
    keep_calibration(this_machine(setup.ranks).name, ratio)
    say(
        f"{where}: card {gb(cost.card)} predicted, {gb(total)} measured "
        f"({gb(allocated)} allocated, {gb(reserved)} reserved, the rest context), ratio "
        f"{ratio:.3f}, kept for the next plan; host {gb(host)} predicted, {gb(measured_host)} "
        f"measured; {gb(free)} of the card is free"
    )


def _used_outside(reserved: int) -> tuple[int, int]:
    """Peak of this process on the card with its context, and what is free now."""
    free, everything = torch.cuda.mem_get_info()
    context = max(0, everything - free - torch.cuda.memory_reserved())
    return reserved + context, free
