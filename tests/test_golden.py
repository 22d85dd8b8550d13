"""The network equals MinImagen's, and the check that says so can fail."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

FOLDER = Path(__file__).parent
RECORDS = sorted((FOLDER / "golden").glob("*.safetensors"))


def run_check(*files):
    command = [sys.executable, FOLDER / "check_golden.py", *files]
    return subprocess.run(command, capture_output=True, text=True)


def test_records_are_there():
    assert len(RECORDS) == 3


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_record(record):
    done = run_check(record)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unet1/p_mean" in done.stdout


def test_a_changed_record_is_noticed(tmp_path):
    with safe_open(RECORDS[0], "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors["unet1/outputs/forward"] += torch.full((1, 1, 1, 1), 3e-5)
    changed = tmp_path / "changed.safetensors"
    save_file(tensors, changed, metadata)
    done = run_check(changed)
    assert done.returncode == 1
    assert "BEYOND" in done.stdout
