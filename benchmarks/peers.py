"""The published packages that the benchmarks compare with: MinImagen and imagen-pytorch.

They are installed into a folder of their own that only a benchmark's child process sees, without
their dependencies: MinImagen pins torch 1.12 and numpy 1.23. What they import beyond what this
project already brings is listed here. Only their U-Nets are used.
"""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import click

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = (
    "minimagen==0.0.9", "imagen-pytorch==2.1.0", "accelerate==1.15.0", "beartype==0.23.1",
    "einops==0.8.2", "einops-exts==0.0.4", "ema-pytorch==0.8.3", "kornia==0.9.0",
    "kornia-rs==0.2.0", "pytorch-warmup==0.2.0", "resize-right==0.0.2",
)  # fmt: skip
# Text features come from this project: OpenCLIP is imported there and not used.
GIGAGAN = (
    "gigagan-pytorch==0.3.0", "accelerate==1.15.0", "beartype==0.23.1", "einops==0.8.2",
    "ema-pytorch==0.8.3", "kornia==0.9.0", "kornia-rs==0.2.0", "numerize==0.12", "tqdm",
)  # fmt: skip
_MARKER = "installed.txt"


def install(folder: Path, requirements: Sequence[str] = REQUIREMENTS) -> None:
    """Installs the peers into a folder unless they are there.

    Args:
        folder: Where; others than these are put into another one.
        requirements: What.

    Raises:
        click.ClickException: If pip fails.
    """
    # torchvision goes with one torch release: its minor version is torch's plus 15.
    torch_minor = int(importlib.metadata.version("torch").split(".")[1])
    wanted = [*requirements, f"torchvision==0.{torch_minor + 15}.*"]
    marker = folder / _MARKER
    if marker.is_file() and marker.read_text().split() == wanted:
        return
    click.echo(f"installing {' and '.join(wanted[:2])} into {folder}", err=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade",
               "--disable-pip-version-check", "--target", str(folder), *wanted]  # fmt: skip
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise click.ClickException(f"the peers cannot be installed: {done.stderr.strip()}")
    marker.write_text("\n".join(wanted))


def environment(folder: Path, threads: int | None, *, bind: bool = True) -> dict[str, str]:
    """The variables of a child process that sees the peers and this checkout.

    Args:
        folder: Where the peers are.
        threads: Of OpenMP; None takes one for each core.
        bind: Each OpenMP thread to a core: left to wander, times on a shared machine vary
            several-fold. Not where a library brings threads of its own to the same cores.
    """
    checkout = [str(ROOT), str(ROOT / "export")]
    path = [str(folder.resolve()), *checkout, *filter(None, [os.environ.get("PYTHONPATH")])]
    cores = sorted(os.sched_getaffinity(0))[:threads]
    binding = {
        "OMP_PLACES": ",".join(f"{{{core}}}" for core in cores),
        "OMP_PROC_BIND": "true",
    }
    return os.environ | (binding if bind else {}) | {
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(len(cores)),
    }  # fmt: skip


def run_inside(folder: Path, script: str) -> NoReturn:
    """Runs a benchmark once more in a process that sees the peers, and exits as it does.

    Args:
        folder: Where the peers are; they are installed if they are not there.
        script: Called with this process's arguments and `--inside`.
    """
    install(folder)
    # ONNX Runtime and OpenVINO have threads of their own, on every core.
    done = subprocess.run(
        [sys.executable, script, *sys.argv[1:], "--inside"],
        env=environment(folder, None, bind=False),
    )
    sys.exit(done.returncode)


def import_unets() -> tuple[Any, Any]:
    """The classes `minimagen.Unet.Unet` and `imagen_pytorch.Unet`."""
    import transformers

    import_torchvision()
    # imagen-pytorch asks the model hub for its default encoder's width while it is imported.
    t5 = transformers.T5Config(d_model=768)
    with mock.patch.object(transformers.T5Config, "from_pretrained", lambda name: t5):
        import imagen_pytorch
    import minimagen.Unet

    return minimagen.Unet.Unet, imagen_pytorch.Unet


def import_torchvision() -> None:
    """Imports torchvision, also one built for CUDA beside a torch for the CPU.

    Its operators then do not load, and it fails to describe two of them. No U-Net calls them.
    """
    import torch

    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision  # noqa: F401


_libraries: list[Any] = []  # what they define lives as long as they do
