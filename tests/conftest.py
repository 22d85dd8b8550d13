"""Shared fixtures. Helpers are in `support`; nothing is imported from here."""

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import cpuinfo
import pytest
from hypothesis import settings
from support import ROOT, planned
from support import launch as launching
from support.environment import environment_of_no_launcher
from support.tiny import TINY, write_run

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch, imported later, shares the processor
pytest.register_assert_rewrite("support.runs")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job is deaf to Ctrl-C, and would make the programs under test so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if (
    signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
):  # and what `nohup` starts to a closed terminal
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# DeepSpeed asks for it in every engine, and each answer takes a process and a second.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)

# Timings on a shared machine say nothing.
settings.register_profile("imagen-scale", deadline=None, max_examples=30)
settings.load_profile("imagen-scale")


@pytest.fixture(scope="session", autouse=True)
def private_folders():
    """Operators and prepared data of the tests stay apart from the user's own.

    Both survive the session under the repository's cache, so that operators compile once.
    """
    cache = Path(os.environ.get("PYTEST_CACHE", ROOT / ".pytest_cache")) / "imagen-scale"
    planned.lay_out(cache / "prepared" / "plan")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(cache / "torch_extensions")
    os.environ["IMAGEN_SCALE_CACHE"] = str(cache / "prepared")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["WANDB_MODE"] = "offline"
    return cache


def pytest_collection_modifyitems(items):
    """Files that train come first, so that no long one is left to one worker at the end."""
    long = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: item.path not in long)


def pytest_unconfigure(config):
    """Removes what killed ranks left in memory, once all workers have ended."""
    if not hasattr(config, "workerinput"):
        for leftover in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*"):
            leftover.unlink(missing_ok=True)


@pytest.fixture
def tiny_config(tmp_path):
    """Path of a configuration that trains two U-Nets in seconds."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of both stages, never trained."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def launch(private_folders):
    """Runs launch/train.py to its end."""
    return launching.launch


@pytest.fixture(scope="session")
def process_group(private_folders):
    """DeepSpeed in this process, as the only rank; it cannot be joined a second time."""
    from imagen_scale.training import launch_variables, ranks

    with environment_of_no_launcher():
        launch_variables.fill_environment()
        ranks.check_machine()
        ranks.join()
        yield
        ranks.stop()


@pytest.fixture(scope="session")
def bundled(private_folders, tmp_path_factory):
    """A bundle of `exported`; copy before changing it."""
    from support.exported import bundled_run

    kept = bundled_run(private_folders)
    return shutil.copytree(kept.parent, tmp_path_factory.mktemp("bundled") / "kept") / kept.name


@pytest.fixture(scope="session")
def exported(private_folders, tmp_path_factory):
    """A run with ONNX exports of both stages in fp32 and fp16; copy before changing it."""
    from support.exported import exported_run

    run = tmp_path_factory.mktemp("exported") / "tiny"
    return shutil.copytree(exported_run(private_folders), run)
