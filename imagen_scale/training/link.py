"""How fast the cards exchange gradients, for the planner."""

import time

import torch

from imagen_scale.planning.machine import LINK_BYTES_PER_S
from imagen_scale.training.ranks import world_size

ELEMENTS = 32 * 2**20  # 64 MiB in bf16: a bucket's size
ROUNDS = 5


def link_bytes_per_s() -> float:
    """What each card sends per second when all reduce together; all ranks call this together.

    Without cards, or with one, nothing is measured and the planner's assumption is given.
    """
    if not torch.cuda.is_available() or world_size() == 1:
        return LINK_BYTES_PER_S
    buffer = torch.zeros(ELEMENTS, dtype=torch.float16, device="cuda")
    torch.distributed.all_reduce(buffer)  # connects
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(ROUNDS):
        torch.distributed.all_reduce(buffer)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    # Around the ring twice, but for its own part (NVIDIA/nccl-tests, doc/PERFORMANCE.md).
    sent = 2 * (world_size() - 1) / world_size() * buffer.nbytes * ROUNDS
    return sent / max(seconds, 1e-9)
