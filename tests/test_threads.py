"""Processor threads: shared among the processes of a machine, asleep while they wait."""

import os
import subprocess
import sys

import psutil
import pytest
import torch
from click.testing import CliRunner
from support import ROOT

from imagen_scale.commands.main import main
from imagen_scale.data import loading
from imagen_scale.data.loading import loader_processes
from imagen_scale.training.threads import cores_each, ranks_here, share_cores

COUNTERS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE", "WORLD_SIZE")


@pytest.fixture
def launched(monkeypatch):
    """Sets the variables of a launcher, and none of another's."""

    def launched(**variables):
        for name in (*COUNTERS, "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launched


@pytest.mark.parametrize(("variables", "expected"), [
    ({}, 1),
    ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, 4),  # torchrun
    ({"LOCAL_SIZE": "2", "WORLD_SIZE": "8"}, 2),  # deepspeed
    ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "WORLD_SIZE": "16"}, 8),
    ({"SLURM_STEP_TASKS_PER_NODE": "3,2", "WORLD_SIZE": "5"}, 3),
    ({"WORLD_SIZE": "2"}, 2),
])  # fmt: skip
def test_every_launcher_says_how_many_are_here(variables, expected, launched):
    launched(**variables)
    assert ranks_here() == expected


def test_cores_are_physical_shared_and_never_none(monkeypatch):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 32 if logical else 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: list(range(32)))
    assert [cores_each(ranks) for ranks in (1, 4, 16, 64)] == [16, 4, 1, 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: [0, 1])  # a container's
    assert cores_each(1) == 2


@pytest.mark.parametrize(("variables", "threads"), [
    ({}, 6),  # deepspeed sets nothing
    ({"OMP_NUM_THREADS": "3"}, None),
    ({"OMP_NUM_THREADS": "1"}, None),
    ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 6),  # torchrun's own
    ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "none"}, None),
])  # fmt: skip
def test_the_users_own_number_stays(variables, threads, launched, monkeypatch):
    launched(**variables, LOCAL_WORLD_SIZE="2")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 12)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: list(range(12)))
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    share_cores()
    assert told == ([] if threads is None else [threads])


def test_torchs_number_is_openmps_which_the_compiled_optimizer_uses():
    """In a process of its own: one OpenMP for all, and it follows torch."""
    code = """
import ctypes, torch
from pathlib import Path
[library] = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
torch.set_num_threads(3)
print(ctypes.CDLL(library).omp_get_max_threads())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]


@pytest.mark.parametrize(("own", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_asleep_from_before_torch_comes(own, expected, monkeypatch, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {} if own is None else {"OMP_WAIT_POLICY": own}
    path = tmp_path / "none.json"
    # Reading the configuration, which fails here, is what training does first.
    code = f"""
import os, sys
sys.argv = ["train.py", "--config", {str(path)!r}]
from imagen_scale.commands.train_process import main
try:
    main()
finally:
    print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.stdout.split() == [expected, "False"]
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", own) if own else None
    CliRunner().invoke(main, ["config", "check", str(path)])
    assert os.environ["OMP_WAIT_POLICY"] == expected
    monkeypatch.delenv("OMP_WAIT_POLICY")


@pytest.mark.parametrize(("written", "are_stored", "cores", "on_card", "expected"), [
    (None, False, 8, True, 4),
    (None, False, 3, True, 2),
    (None, False, 1, True, 1),
    (None, True, 8, True, 0),
    (None, False, 8, False, 0),
    (0, False, 8, True, 0),
    (7, True, 1, False, 7),
])  # fmt: skip
def test_processes_load_where_pictures_are_decoded_for_a_card(
    written, are_stored, cores, on_card, expected, monkeypatch
):
    monkeypatch.setattr(loading.torch.cuda, "is_available", lambda: on_card)
    assert loader_processes(written, are_stored=are_stored, cores=cores) == expected
