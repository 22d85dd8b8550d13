"""What the `training` section says of torch's own ways to compute."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from imagen_scale.config.sections import TrainingConfig
from imagen_scale.models.card import tf32


def prepare_determinism(training: TrainingConfig) -> None:
    """Tells cuBLAS before it starts what it reads then only; a setting of the user's own stays."""
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def switched(training: TrainingConfig) -> Iterator[None]:
    """Sets torch's switches as a configuration says, and back afterwards.

    Args:
        training: `tf32`, `cudnn_benchmark` and `deterministic`; what acts on the network itself,
            `compile` and `channels_last`, is done where it is built.
    """
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    before = cudnn.benchmark, cudnn.deterministic
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = memory.fill_uninitialized_memory
    try:
        cudnn.benchmark = training.cudnn_benchmark
        if training.deterministic:
            cudnn.deterministic = True
            torch.use_deterministic_algorithms(True, warn_only=False)
            # Nothing here reads what it has not written, so NaN need not be written there first.
            memory.fill_uninitialized_memory = False
        with tf32(training.tf32):
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
        if training.deterministic:
            torch.use_deterministic_algorithms(is_deterministic, warn_only=warns_only)
            memory.fill_uninitialized_memory = fills
