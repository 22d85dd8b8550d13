"""DeepSpeed's compiled operators: which are needed here, whether they are built, building them."""

import contextlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from imagen_scale.errors import EnvironmentProblem
from imagen_scale.files.caches import (
    OPERATORS_VARIABLE,
    cannot_write,
    operators_dir,
)

COMMUNICATION, CPU_ADAM = "deepspeed_shm_comm", "cpu_adam"


class Operator(NamedTuple):
    """One operator of DeepSpeed's that training uses on this machine."""

    name: str  # also the name of its folder and library
    used_for: str
    is_built: bool
    builder: Any

    @property
    def folder(self) -> Path:
        """Where it is compiled."""
        return extensions_dir() / self.name


def has_compiler() -> bool:
    """Whether the C++ compiler that torch would call is there."""
    return shutil.which(os.environ.get("CXX", "c++")) is not None


def operators() -> list[Operator]:
    """The operators that training uses on this machine, as they stand.

    Raises:
        ImportError: If DeepSpeed is not installed.
    """
    from deepspeed.accelerator import get_accelerator

    wanted = {"CPUAdamBuilder": "optimizers offloaded to host memory"}
    if get_accelerator().device_name() == "cpu":
        wanted["ShareMemCommBuilder"] = "several processes on one machine"
    found = []
    for builder_name, used_for in wanted.items():
        builder = get_accelerator().create_op_builder(builder_name)
        name = builder.name
        is_built = _is_installed(name) or (extensions_dir() / name / f"{name}.so").is_file()
        found.append(Operator(name, used_for, is_built, builder))
    return found


def _is_installed(name: str) -> bool:
    """Whether DeepSpeed was installed with this operator compiled."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get(name, False))


def build_missing(names: Collection[str], say: Callable[[str], None]) -> None:
    """Compiles what is not compiled of the operators named; silent when nothing has to be done.

    Locks that a killed build left behind are removed first: DeepSpeed would wait for them for
    ever.

    Raises:
        EnvironmentProblem: With the compiler's complaint, or if the folder cannot be written.
    """
    clear_stale_locks(extensions_dir(), say)
    for operator in operators():
        if operator.name in names and not _is_installed(operator.name):
            check_extensions_dir()
            if not operator.is_built:
                build(operator, say)


def build(operator: Operator, say: Callable[[str], None]) -> None:
    """Compiles one operator where training will look for it, and loads it.

    Args:
        operator: From `operators`.
        say: Told of the compiler's steps.

    Raises:
        EnvironmentProblem: With the compiler's complaint.
    """
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise EnvironmentProblem(
            f"{operator.name}: it cannot be compiled, since Python's headers are missing. Install "
            f"them: `apt install python3-dev` (Debian, Ubuntu), `dnf install python3-devel` "
            f"(Fedora)."
        )
    check_extensions_dir()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_dir())
    # An environment that is called without being activated: ninja lies beside its python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    say(f"compiling DeepSpeed's {operator.name} into {operator.folder} (once, 1-3 min)")
    try:
        operator.builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        raise EnvironmentProblem(
            f"{operator.name}: it cannot be compiled: {error}\nLook at the compiler and Python's "
            f"headers in the rows of `imagen-scale doctor`, delete {operator.folder} and try again."
        ) from error


def extensions_dir() -> Path:
    """Where this machine's compiled operators live."""
    return operators_dir().resolve()  # as /proc names the files that processes hold open


def check_extensions_dir() -> None:
    """Makes the folder; torch locks it even where the operators in it are compiled already.

    Raises:
        EnvironmentProblem: If it cannot be written.
    """
    folder = extensions_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".{os.getpid()}").touch()
        (folder / f".{os.getpid()}").unlink()
    except OSError as error:
        raise cannot_write(folder, error, OPERATORS_VARIABLE) from None


def clear_stale_locks(folder: Path, say: Callable[[str], None]) -> None:
    """Removes build locks that no living process holds.

    torch's builder keeps its lock file open while it works, so a lock that nobody has open
    belongs to a process that was killed (torch 2.13, `torch/utils/file_baton.py`).
    """
    locks = {str(path.resolve()) for path in folder.glob("*/lock")}
    if not locks:
        return
    import psutil

    held = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            held |= {file.path for file in process.open_files()} & locks
    for lock in sorted(locks - held):
        Path(lock).unlink(missing_ok=True)
        say(f"removed the lock of a killed build: {lock}")
