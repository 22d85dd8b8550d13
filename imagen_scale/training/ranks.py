"""Processes and the group they form."""

import errno
import itertools
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from imagen_scale.data.storage import first_line
from imagen_scale.errors import DiskProblem, EnvironmentProblem, ImagenScaleError
from imagen_scale.training.launch_variables import NETWORK_ADVICE, shows_one_card_each
from imagen_scale.training.operators import has_compiler

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store  # type: ignore[attr-defined]

# How long a collective waits for the other ranks.
PATIENCE = timedelta(minutes=30)
LOOK_S = 0.2  # between two looks into the store
_told = itertools.count()  # of `told_by_rank_0`: every rank counts the same ones
# What a full or unwritable disk answers. A path that is not there is none of it.
_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip
_local_rank: int | None = None  # where LOCAL_RANK had to become the number of a card
_exchanges = 0

T = TypeVar("T")


def rank() -> int:
    """This process's number."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number among those of its machine.

    DeepSpeed takes LOCAL_RANK for the number of a card. The two differ where each process sees one
    card only, its own: that is card 0 to all of them.
    """
    return int(os.environ["LOCAL_RANK"]) if _local_rank is None else _local_rank


def exchanges() -> int:
    """How many exchanges with the other ranks this one has come to; all come to the same ones."""
    return _exchanges


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
        _take_card(torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
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


def _take_card(cards: int) -> None:
    """Makes LOCAL_RANK the number of this process's card, of so many that it sees.

    Raises:
        EnvironmentProblem: If there is none for it.
    """
    global _local_rank
    number = local_rank()
    if cards == 1 and number > 0 and shows_one_card_each():
        _local_rank, os.environ["LOCAL_RANK"] = number, "0"
    elif number >= cards:
        raise EnvironmentProblem(
            f"process {number} of this machine finds no card: {cards} are visible. Start at most "
            f"{cards} processes here."
        )


def join(store: "Store | None" = None) -> None:
    """Joins the process group.

    torch alone joins: DeepSpeed would compile an operator first, where the ranks cannot wait for
    each other.

    Args:
        store: Which the ranks have in common; None for the one at MASTER_ADDR and MASTER_PORT,
            which one rank does not need.

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
    if store is None and world_size() == 1:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    if store is not None:
        options |= {"store": store, "rank": rank(), "world_size": world_size()}
    try:
        torch.distributed.init_process_group(
            get_accelerator().communication_backend_name(), timeout=PATIENCE, **options
        )
    except RuntimeError as error:
        raise EnvironmentProblem(
            f"{world_size()} processes could not join: {first_line(error)}. {NETWORK_ADVICE}"
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
    come_to_exchange()
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
    come_to_exchange()
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


def side_by_side(items: Iterable[T]) -> Iterator[T]:
    """The same items, which all ranks make together; one that is slow to use an item is behind."""
    for item in items:
        yield item
        come_to_exchange()


def mean_over_ranks(value: "Tensor") -> float:
    """Mean of a scalar that every rank has; changes `value`. All ranks together."""
    import torch

    torch.distributed.all_reduce(value)
    return value.item() / world_size()


def come_to_exchange() -> None:
    """Counts that this rank has done its part and waits; one that has not come is behind."""
    global _exchanges
    _exchanges += 1


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
