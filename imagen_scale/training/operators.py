"""DeepSpeed's compiled operators: which are needed here, whether they are built, building them."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from imagen_scale.errors import EnvironmentProblem
from imagen_scale.training.distributed import extensions_dir


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


def build(operator: Operator, say: Callable[[str], None]) -> None:
    """Compiles one operator where training will look for it, and loads it.

    Args:
        operator: From `operators`.
        say: Told of the compiler's steps.

    Raises:
        EnvironmentProblem: With the compiler's complaint.
    """
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_dir())
    # An environment that is called without being activated: ninja lies beside its python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    say(f"compiling {operator.name} into {operator.folder} (1-3 min)")
    try:
        operator.builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        raise EnvironmentProblem(
            f"{operator.name}: it cannot be compiled: {error}\nLook at the compiler and Python's "
            f"headers in the rows of `imagen-scale doctor`, delete {operator.folder} and try again."
        ) from error
