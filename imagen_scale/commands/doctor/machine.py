"""The machine: Python, cards, memory, disk."""

import errno
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from imagen_scale.commands.doctor.finding import Finding, State, of_problem
from imagen_scale.files.caches import (
    OPERATORS_VARIABLE,
    cache_root,
    cannot_write,
    hub_home,
    is_writable,
    operators_dir,
)
from imagen_scale.models.card import BF16_CAPABILITY
from imagen_scale.models.host import host_memory

GIB = 2**30
SUPPORTED_PYTHON = ((3, 11), (3, 13))
# DeepSpeed's Adam and prepared pictures stay in host memory; the demo takes about 1 GiB.
LOW_RAM_BYTES = 8 * GIB
LOW_DISK_BYTES = 20 * GIB  # two checkpoints of the 12 GB cascade
NO_DISK_BYTES = 2 * GIB
LOW_SHARED_BYTES = GIB


def python() -> Iterator[Finding]:
    """The interpreter."""
    low, high = SUPPORTED_PYTHON
    seen = f"{platform.python_version()}, {sys.executable}"
    if low <= sys.version_info[:2] <= high:
        yield Finding("Python", "ok", seen)
    else:
        yield Finding(
            "Python", "problem", seen, "Make an environment with Python 3.11, 3.12 or 3.13."
        )


def torch_and_cards() -> Iterator[Finding]:
    """torch, the driver, and each card's memory and compute capability."""
    try:
        import torch
    except ImportError as error:
        yield Finding(
            "torch", "problem", f"cannot be imported: {error}",
            "pip install -c constraints.txt .",
        )  # fmt: skip
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build for the CPU"
    yield Finding("torch", "ok", f"{torch.__version__}, {build}")
    driver = nvidia_driver()
    if not torch.cuda.is_available():
        yield _no_card(driver, torch.version.cuda)
        return
    yield Finding("NVIDIA driver", "ok", driver or "present")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = (properties.major, properties.minor)
        yield card(index, properties.name, free, total, capability)


def card(index: int, name: str, free: int, total: int, capability: tuple[int, int]) -> Finding:
    """One card.

    Args:
        index: Its number, from 0.
        name: Its maker's name.
        free: Bytes.
        total: Bytes.
        capability: CUDA compute capability, (major, minor).
    """
    seen = (
        f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, "
        f"compute capability {capability[0]}.{capability[1]}"
    )
    if capability < BF16_CAPABILITY:
        remedy = "It has no bf16: leave training.precision at auto, which takes fp16 here."
        return Finding(f"card {index}", "warning", seen, remedy)
    if free < 0.8 * total:
        remedy = "Other programs hold much of it: close them (`nvidia-smi` names them)."
        return Finding(f"card {index}", "warning", seen, remedy)
    return Finding(f"card {index}", "ok", seen)


def _no_card(driver: str | None, built_for: str | None) -> Finding:
    if driver and not built_for:
        return Finding(
            "NVIDIA driver", "problem", f"{driver}, but torch is built for the CPU",
            "Install a CUDA build of torch: see pytorch.org/get-started.",
        )  # fmt: skip
    if driver:
        return Finding(
            "NVIDIA driver", "problem", f"{driver}, but torch finds no card",
            f"Update the driver to one for CUDA {built_for}; look at CUDA_VISIBLE_DEVICES too.",
        )  # fmt: skip
    return Finding(
        "NVIDIA driver", "warning", "none: everything is computed on the CPU",
        "If there is a card, install its driver; without one, small cascades only.",
    )  # fmt: skip


def nvidia_driver() -> str | None:
    """Version of NVIDIA's driver; None without one."""
    version = Path("/sys/module/nvidia/version")
    if version.is_file():
        return version.read_text().strip()
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def ram() -> Iterator[Finding]:
    """Host memory."""
    available, total = host_memory()
    seen = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if available < LOW_RAM_BYTES:
        remedy = (
            "Offloaded optimizers live here; close programs, and see what a run needs with "
            "`imagen-scale plan --config FILE`."
        )
        yield Finding("RAM", "warning", seen, remedy)
    else:
        yield Finding("RAM", "ok", seen)


def pinned_memory() -> Iterator[Finding]:
    """How much memory may be pinned, which makes copies to a card fast."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    is_unlimited = limit == resource.RLIM_INFINITY
    said = "unlimited" if is_unlimited else f"{limit / 2**20:.0f} MiB"
    seen = f"ulimit -l {said}"
    if "microsoft" in platform.release().lower():
        yield Finding(
            "pinned memory", "warning", f"{seen}; WSL 2 limits it",
            "Offloaded states are not pinned here, which is slower. Give WSL more memory in "
            ".wslconfig, or train under Linux.",
        )  # fmt: skip
    elif not is_unlimited and Path("/sys/class/infiniband").is_dir():
        yield Finding(
            "pinned memory", "warning", f"{seen}; InfiniBand pins its buffers",
            "Set `ulimit -l unlimited` (memlock in /etc/security/limits.conf).",
        )  # fmt: skip
    else:
        yield Finding("pinned memory", "ok", f"{seen}; CUDA's own pinning is not bound by it")


def shared_memory() -> Iterator[Finding]:
    """Where loader processes and ranks of one machine exchange data."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    total = shutil.disk_usage(folder).total
    seen = f"{total / GIB:.2f} GiB in /dev/shm"
    if total < LOW_SHARED_BYTES:
        remedy = "Start the container with --shm-size 4g, or set data.num_workers to 0."
        yield Finding("shared memory", "warning", seen, remedy)
    else:
        yield Finding("shared memory", "ok", seen)


def caches() -> Iterator[Finding]:
    """Whether what is kept between programs can be written: ours, and that of libraries."""
    denied = OSError(errno.EACCES, os.strerror(errno.EACCES))
    kept: list[tuple[str, Path, tuple[str, ...], State]] = [
        ("prepared data", cache_root(), (), "problem"),
        ("operators", operators_dir(), (OPERATORS_VARIABLE,), "problem"),
        ("models of the hub", hub_home(), ("HF_HOME",), "warning"),  # what lies there is read
    ]
    for what, folder, variables, state in kept:
        if is_writable(folder):
            yield Finding("caches", "ok", f"{what} in {folder}")
        else:
            yield of_problem("caches", cannot_write(folder, denied, *variables), state)


def disk(folders: dict[str, Path]) -> Iterator[Finding]:
    """Free space where files are written.

    Args:
        folders: What each holds, and where it is.
    """
    for what, folder in folders.items():
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        seen = f"{free / GIB:.1f} GiB free for {what} in {there}"
        if not os.access(there, os.W_OK):
            yield Finding("disk", "problem", f"{there} may not be written ({what})",
                          "Change its owner or rights, or work in another folder.")  # fmt: skip
        elif free < LOW_DISK_BYTES:
            state = "problem" if free < NO_DISK_BYTES else "warning"
            remedy = "Make room: a run keeps two checkpoints of about 16 bytes a parameter."
            yield Finding("disk", state, seen, remedy)  # type: ignore[arg-type]
        else:
            yield Finding("disk", "ok", seen)
