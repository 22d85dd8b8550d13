"""How many threads of the processor each training process takes."""

import os


def ranks_here() -> int:
    """Training processes on this machine, as the launcher counts them."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun's and DeepSpeed's
        if name in os.environ:
            return int(os.environ[name])
    # SLURM writes "4(x2)" for two machines with four each; where they differ, its first.
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("WORLD_SIZE", "1"))
    return int(tasks.partition(",")[0].partition("(")[0])


def cores_each(ranks: int) -> int:
    """Physical cores for each of the processes of this machine, at least one."""
    import psutil

    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    # A container or SLURM may allow fewer; macOS does not tell.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical // ranks, allowed))


def share_cores() -> None:
    """Divides the cores among the processes; a number of the user's own stays.

    DeepSpeed's launcher lets each process take all of them, and torchrun gives each one thread,
    with which AdamW would step offloaded states several times slower. DeepSpeed's compiled AdamW
    takes as many threads as torch: both use the same OpenMP.
    """
    import torch

    if not _was_set_by_user():
        torch.set_num_threads(cores_each(ranks_here()))


def _was_set_by_user() -> bool:
    """Whether OMP_NUM_THREADS is there and not torchrun's own 1, which cannot be told from one."""
    number = os.environ.get("OMP_NUM_THREADS")
    return number is not None and not (number == "1" and "TORCHELASTIC_RUN_ID" in os.environ)
