"""Nobody hears a training any more: it goes on."""

import json
import os
from pathlib import Path

import pytest
from support import ROOT
from support.environment import without_launcher
from support.forker import fork
from support.tiny import TINY


@pytest.fixture(params=["broken pipe", "full disk"])
def output(request):
    """A file that takes nothing."""
    if request.param == "full disk":
        with Path("/dev/full").open("w") as file:
            yield file
    else:
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as file:
            yield file


@pytest.mark.distributed
def test_a_training_goes_on_when_nothing_takes_what_it_says(output, tmp_path, private_folders):
    config, run = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps(TINY | {"training": TINY["training"] | {"steps": 3}}))
    argv = [ROOT / "launch" / "train.py", "--config", config, "--run", run, "--unet", "1"]
    process = fork(argv, without_launcher(), stdout=output, stderr=output)
    process.join(240)
    assert process.exitcode == 0
    assert list(run.glob("unet1/inference*"))
