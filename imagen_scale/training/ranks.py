"""Processes and the group they form."""

import errno
import itertools
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagen_scale.errors import DiskProblem, EnvironmentProblem, ImagenScaleError
from imagen_scale.training.optimizers import has_compiler

if TYPE_CHECKING:
    from torch import Tensor

# SLURM's names for what torch.distributed reads.
_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
}
# How long a collective waits for the other ranks.
PATIENCE = timedelta(minutes=30)
LOOK_S = 0.2  # between two looks into the store
_told = itertools.count()  # of `told_by_rank_0`: every rank counts the same ones
# What a full or unwritable disk answers. A path that is not there is none of it.
_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip
_SINGLE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def rank() -> int:
    """This process's number."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_machine() -> None:
    """Refuses a machine on which training cannot start, and takes this process's card.

    Raises:
        EnvironmentProblem: If DeepSpeed, a compiler, Python's headers or the card are missing.
    """
    try:
        import deepspeed  # noqa: F401
        import torch
        from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        raise EnvironmentProblem(
            f"DeepSpeed cannot be imported ({error}). Install it with "
            f"`pip install -c constraints.txt '.[train]'`."
        ) from None
    # An environment that is called without being activated: ninja lies beside its python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if get_accelerator().device_name() == "cuda":
        cards, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if cards == 1 and "SLURM_STEP_ID" in os.environ:
            local_rank = 0  # srun --gpus-per-task=1 shows each task a card of its own
        if local_rank >= cards:
            raise EnvironmentProblem(
                f"process {local_rank} of this machine finds no card: {cards} are visible. Start "
                f"at most {cards} processes here."
            )
        torch.cuda.set_device(local_rank)
    elif not has_compiler():
        raise EnvironmentProblem(
            "DeepSpeed compiles its CPU operators and found no C++ compiler. Install one: "
            "`apt install g++` (Debian, Ubuntu), `dnf install gcc-c++` (Fedora)."
        )
    elif not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise EnvironmentProblem(
            "DeepSpeed compiles its CPU operators and Python's headers are missing. Install them: "
            "`apt install python3-dev` (Debian, Ubuntu), `dnf install python3-devel` (Fedora)."
        )


def join() -> None:
    """Joins the process group, whoever started this process.

    Works under `deepspeed`, `torchrun`, `srun` and plain `python` (one process). torch alone
    joins: DeepSpeed would compile an operator first, where the ranks cannot wait for each other.

    Raises:
        EnvironmentProblem: If the group cannot be formed.
    """
    import torch
    from deepspeed.accelerator import get_accelerator

    options: dict[str, Any] = {}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what encoding captions left there
        if world_size() > 1:  # as DeepSpeed does: NCCL then needs not guess the card
            options["device_id"] = torch.device("cuda", torch.cuda.current_device())
    try:
        torch.distributed.init_process_group(
            get_accelerator().communication_backend_name(), timeout=PATIENCE, **options
        )
    except RuntimeError as error:
        raise EnvironmentProblem(
            f"{world_size()} processes could not join: {error}\nIf a port is in use, give another "
            f"with `deepspeed --master_port`."
        ) from error


def stop() -> None:
    """Leaves the process group."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def from_rank_0(make: Callable[[], Any]) -> Any:
    """Runs `make` on rank 0 and gives its result, or its exception, to every rank."""
    import torch

    result: list[Any] = [None, None]
    failure = None
    if rank() == 0:
        try:
            result[0] = make()
        except Exception as error:
            failure = error
            result[1] = _portable(error)
    torch.distributed.broadcast_object_list(result, src=0)
    _trace(failure)
    if result[1] is not None:
        raise result[1]
    return result[0]


def told_by_rank_0(make: Callable[[], Any]) -> Any:
    """As `from_rank_0`, for work that may take minutes.

    The others look into the group's store now and then. A collective would keep their cards busy
    with waiting, and give up after `PATIENCE`.
    """
    import torch

    made: list[Any] = [None, None]
    if rank() == 0:
        try:
            made[0] = make()
        except Exception as error:
            made[1] = error
    if world_size() > 1:
        store: Any = torch.distributed.distributed_c10d._get_default_store()
        key = f"imagen-scale told by rank 0, {next(_told)}"
        if rank() == 0:
            store.set(key, "done")
        while not store.check([key]):
            time.sleep(LOOK_S)

    def give() -> Any:
        if made[1] is not None:
            raise made[1]
        return made[0]

    return from_rank_0(give)


def from_all(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    import torch

    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def together(work: Callable[[], None]) -> None:
    """Runs `work` on every rank; if it fails on one, all raise, so that none waits for ever."""
    failure = None
    try:
        work()
    except Exception as error:
        failure = error
    failures = from_all(failure and _portable(failure))
    _trace(failure)
    for portable in failures:
        if portable is not None:
            raise portable


def mean_over_ranks(value: "Tensor") -> float:
    """Mean of a scalar that every rank has; changes `value`. All ranks together."""
    import torch

    torch.distributed.all_reduce(value)
    return value.item() / world_size()


def sum_over_ranks(values: "Tensor") -> list[Any]:
    """Sums over ranks as nested lists, one for each dimension; changes `values`. All together."""
    import torch

    torch.distributed.all_reduce(values)
    return values.tolist()


def _portable(error: Exception) -> Exception:
    """The error as one that can be sent to other ranks."""
    if isinstance(error, ImagenScaleError):
        return error
    is_disk = isinstance(error, OSError) and error.errno in _DISK
    problem = DiskProblem if is_disk else EnvironmentProblem
    return problem(f"process {rank()}: {type(error).__name__}: {error}")


def _trace(error: Exception | None) -> None:
    """Tells where a fault of ours happened, once the ranks have agreed on it.

    They cannot when one of them is lost: that made the error, and the watchdog tells it.
    """
    if error is not None and not isinstance(error, ImagenScaleError | OSError):
        traceback.print_exception(error)


def fill_environment() -> None:
    """Names this process as torch.distributed expects, under srun and plain python too."""
    if "RANK" not in os.environ:
        # An sbatch script itself, outside srun, is one process whatever the job's size.
        in_step = "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ
        for name, value in _SINGLE.items():
            os.environ[name] = os.environ.get(_SLURM[name], value) if in_step else value
        if in_step and "SLURM_LAUNCH_NODE_IPADDR" in os.environ:
            os.environ.setdefault("MASTER_ADDR", os.environ["SLURM_LAUNCH_NODE_IPADDR"])
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500" if world_size() > 1 else _free_port())


def _free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
