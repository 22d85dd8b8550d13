"""A folder that appears whole or not at all, and what an export needs of the machine."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from imagen_scale.errors import EnvironmentProblem, MissingExtraError, ParityError, UsageError
from imagen_scale.files.atomic import sync
from imagen_scale.files.locks import locked
from imagen_scale.models.host import host_memory
from imagen_scale.sampling.runtimes.manifest import MANIFEST

_STAGING_PREFIX = ".staging_"
REJECTED = ".rejected"
# Exporting and comparing holds the network, its copy in the graph's precision and a session's copy;
# TensorRT-RTX took 3.4 times the ONNX file of a 716 M parameter U-Net to build. The rest is Python
# and activations: 2 GiB for 44.5 M parameters at 64 px.
_ONNX_RAM, _ENGINE_RAM, _REST_BYTES, _SPARE_DISK_BYTES = 2.2, 3.4, 2**31, 2**29


@contextmanager
def staged(
    final: Path, *, force: bool, tell: Callable[[str], None] | None = None
) -> Iterator[Path]:
    """A hidden folder to fill, which takes the name `final` when the block ends well.

    What a killed export left is removed first. When the block raises ParityError the folder is
    kept as `<final>.rejected`, without a manifest's name, so that nothing loads it.

    Args:
        final: The folder to make.
        force: Replace it if it exists.
        tell: Told that another export of the same U-Net is waited for.

    Raises:
        UsageError: If it exists and `force` is not given.
    """
    with locked(final.parent / ".lock", tell):
        if final.exists() and not force:
            raise UsageError(f"{final}: exists already; add --force to replace it.")
        for leftover in final.parent.glob(f"{_STAGING_PREFIX}*"):
            shutil.rmtree(leftover)
        staging = final.with_name(_STAGING_PREFIX + final.name)
        staging.mkdir()
        try:
            yield staging
        except ParityError:
            reject(staging, final)
            raise
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        for path in [*staging.iterdir(), staging]:
            sync(path)
        old = final.with_name(f"{_STAGING_PREFIX}old_{final.name}")
        if final.exists():
            final.rename(old)
        staging.rename(final)
        sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)


def reject(folder: Path, final: Path) -> Path:
    """Moves a failing export aside as `<final>.rejected`, where no runtime looks."""
    rejected = final.with_name(final.name + REJECTED)
    shutil.rmtree(rejected, ignore_errors=True)
    manifest = folder / MANIFEST
    if manifest.exists():
        manifest.rename(folder / "manifest.rejected.json")
    return folder.rename(rejected)


def check_room(folder: Path, *, weights_bytes: int, graph_bytes: int, engine: bool) -> None:
    """Refuses an export that would run out of memory or disk halfway.

    Args:
        folder: Where the export goes; need not exist.
        weights_bytes: Size of the float32 weights.
        graph_bytes: Size of the weights in the graph's precision.
        engine: Whether an engine is built as well.

    Raises:
        EnvironmentProblem: Saying how much is needed and how much is free.
    """
    try:
        available = host_memory().available
    except ImportError:
        raise MissingExtraError(
            "exporting needs the package psutil; run pip install 'imagen-scale[export]'."
        ) from None
    while not folder.exists():
        folder = folder.parent
    ram = weights_bytes * _ONNX_RAM + (graph_bytes * _ENGINE_RAM if engine else 0) + _REST_BYTES
    disk = graph_bytes * (3.3 if engine else 1.1) + _SPARE_DISK_BYTES
    for what, needed, free in (
        ("memory", ram, available),
        (f"disk space in {folder}", disk, shutil.disk_usage(folder).free),
    ):
        if free < needed:
            raise EnvironmentProblem(
                f"this export needs about {needed / 2**30:.1f} GiB of {what} and "
                f"{free / 2**30:.1f} GiB are free. Free some, or export on another machine."
            )
