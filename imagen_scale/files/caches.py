"""Where things are kept between programs: one rule for ours and for those of libraries.

`IMAGEN_SCALE_CACHE` is the folder of ours, else `imagen-scale` in the user's cache folder. A
library that could not write into the home writes below it too, unless its own variable says where.
"""

import errno
import os
import platform
from pathlib import Path

from imagen_scale.errors import EnvironmentProblem

VARIABLE = "IMAGEN_SCALE_CACHE"
OPERATORS_VARIABLE = "TORCH_EXTENSIONS_DIR"
# The variable of each library that writes while it works for us, and where in the home it writes
# without.
LIBRARIES = {
    "HF_HOME": ".cache/huggingface",
    "TRITON_CACHE_DIR": ".triton/cache",
    "MPLCONFIGDIR": ".config/matplotlib",
    "NUMBA_CACHE_DIR": ".cache/numba",
    "CUDA_CACHE_PATH": ".nv/ComputeCache",
    "WANDB_CACHE_DIR": ".cache/wandb",
    "WANDB_CONFIG_DIR": ".config/wandb",
    "WANDB_DATA_DIR": ".local/share/wandb",
}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
UNWRITABLE = _FULL | {errno.EACCES, errno.EPERM, errno.EROFS}


def home() -> Path:
    """The user's home; `/`, as in containers, for a user without a name and without HOME."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")


def expanded(path: str | Path) -> Path:
    """A path with `~` and `~name` replaced; as it is where nobody here has that name."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path's raises without a home


def cache_root() -> Path:
    """The folder of all that this program keeps between its runs; it need not exist."""
    named = os.environ.get(VARIABLE)
    if named:
        return expanded(named)
    return _in_home(".cache/imagen-scale")


def operators_dir() -> Path:
    """Where this machine's compiled operators live; it need not exist.

    One folder per host: the operators are built for the processor of the machine that built
    them, and a home directory may be shared.
    """
    folder = os.environ.get(OPERATORS_VARIABLE)
    return Path(folder) if folder else cache_root() / "torch_extensions" / platform.node()


def hub_home() -> Path:
    """Where the Hugging Face hub's library keeps what it downloads."""
    return Path(os.environ.get("HF_HOME") or _in_home(LIBRARIES["HF_HOME"]))


def settle_caches() -> None:
    """Lets libraries write where they can; before they are imported, since they look then."""
    environ = os.environ
    environ.setdefault("HOME", str(home()))  # without one, some make a folder called ~
    environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it keeps and sends a number of the machine
    root = cache_root()
    if not environ.get(VARIABLE) or not is_writable(root):
        return
    for variable, default in LIBRARIES.items():
        folder = _in_home(default)
        if variable not in environ and not folder.exists() and not is_writable(folder):
            environ[variable] = str(root / variable.lower())


def _in_home(place: str) -> Path:
    """A place in the home; the cache folder of it may be elsewhere."""
    named = os.environ.get("XDG_CACHE_HOME")
    if named and place.startswith(".cache/"):
        return Path(named) / place.removeprefix(".cache/")
    return home() / place


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def cannot_write(path: Path, error: OSError, *variables: str) -> EnvironmentProblem:
    """What a user is told of a cache that cannot be written.

    Args:
        path: The folder or file.
        error: What the system said.
        variables: What else than `IMAGEN_SCALE_CACHE` names the place, before it.
    """
    room = "free disk space, or " if error.errno in _FULL else ""
    named = f"{' or '.join(variables)} (or {VARIABLE})" if variables else VARIABLE
    return EnvironmentProblem(
        f"{path}: cannot be written: {error.strerror or error}; {room}set {named} to a folder that "
        f"can be written."
    )
