"""Several machines through DeepSpeed's launcher, and what pdsh and a shell make of its words."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import ROOT, pdsh
from support.environment import without_launcher
from support.tiny import TINY

from imagen_scale.commands.hosts import carried_variables, hosts_command
from imagen_scale.commands.main import main
from imagen_scale.errors import UsageError
from imagen_scale.training.hostfile import machines_of

# A shell there has nothing of this environment.
SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift 2; done
host=$1; shift
case "$*" in
    "hostname -I") test $host = worker-1 && echo 127.0.0.1 ;;
    *) exec env -i PATH=/usr/bin:/bin HOME=/tmp sh -c "$*" ;;
esac
"""
ODD = """a $HOME "and" 'more' \\ of %h; `ls` * [x]"""


@pytest.fixture
def path_with_pdsh(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    program = f'#!/bin/sh\nexec {sys.executable} {pdsh.__file__} "$@"\n'
    for name, text in (("pdsh", program), ("ssh", SSH)):
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture
def hostfile(tmp_path):
    file = tmp_path / "hostfile"
    file.write_text("# two\nworker-1 slots=1\nworker-2 slots=1\n")
    return file


def shown(environment, hostfile, *words):
    """What a program on each machine finds as its words and variables."""
    command = hosts_command(hostfile, "127.0.0.1", None, list(words))
    at = command.index("--module")
    # Into files: what both print at once is mixed.
    program = (
        "import os, sys, json, pathlib\n"
        "file = pathlib.Path(__file__).with_name('found' + os.environ['RANK'])\n"
        "file.write_text(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    )
    script = hostfile.with_name("show.py")
    script.write_text(program)
    command[at : at + 2] = [str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads(file.read_text()) for file in sorted(hostfile.parent.glob("found*"))]


def test_words_and_variables_arrive_as_they_are(path_with_pdsh, hostfile, tmp_path, monkeypatch):
    (tmp_path / "own").write_text("OWN=1\nGLOO_SOCKET_IFNAME=eth7\n")
    words = ["--set", f"x={ODD}", "a'b$c", "50%n", "", '["two words"]', "[1,2]", "line\nbreak"]
    told = {
        "PATH": path_with_pdsh, "IMAGEN_SCALE_CACHE": ODD, "GLOO_SOCKET_IFNAME": "eth0",
        "HF_HUB_OFFLINE": "1", "WANDB_API_KEY": "hidden", "HF_TOKEN": "hidden",
        "HF_HUB_TOKEN": "hidden", "DS_ENV_FILE": str(tmp_path / "own"),
    }  # fmt: skip
    with carried_variables(without_launcher() | told) as environment:
        both = shown(environment, hostfile, *words)
    assert len(both) == 2
    for arguments, variables in both:
        assert arguments[1:] == words  # the first is DeepSpeed's --local_rank
        assert variables["IMAGEN_SCALE_CACHE"] == ODD
        assert (variables["OWN"], variables["GLOO_SOCKET_IFNAME"]) == ("1", "eth7")
        assert variables["HF_HUB_OFFLINE"] == "1"
        assert not any("hidden" in value for value in variables.values())
    assert {variables["RANK"] for _, variables in both} == {"0", "1"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "Hostfile is empty"),
        ("worker-1 4\n", "bad entry: worker-1 4"),
        ("worker-1 slots=1\nworker-1 slots=1\n", "multiple entries for worker-1"),
        ("worker-1 slots=1\nworker-2 slots=0\n", "slots=0 for worker-2: give the number"),
        (f"worker-1 slots={'9' * 20}\n", "for worker-1: give the number of its cards, 1 to 1000"),
        ("\ufeffworker-1 slots=1\n", "begins with a byte-order mark"),
    ],
)
def test_a_hostfile_that_cannot_be_read_is_refused(text, told, tmp_path):
    file = tmp_path / "hostfile"
    with pytest.raises(UsageError, match="there is no such file"):
        machines_of(file)
    file.write_text(text)
    with pytest.raises(UsageError, match=told):
        machines_of(file)


def test_no_more_processes_than_the_least_of_the_machines_has(tmp_path):
    file, config = tmp_path / "hostfile", tmp_path / "config.json"
    file.write_text("worker-1 slots=4\nworker-2 slots=2\n")
    config.write_text(json.dumps(TINY))
    done = CliRunner().invoke(
        main, ["train", str(config), "--hostfile", str(file), "--gpus", "3", "--dry-run"]
    )
    assert done.exit_code == 2 and "--gpus 3: worker-2 has slots=2" in done.output


def train(path, hostfile, *arguments, **variables):
    script = Path(sys.executable).with_name("imagen-scale")
    return subprocess.run(
        [script, "train", "--hostfile", hostfile, *map(str, arguments)], text=True, timeout=240,
        env=without_launcher() | {"PATH": path} | variables, capture_output=True, cwd=ROOT,
    )  # fmt: skip


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(TINY))
    return file


def test_what_is_missing_is_said_before_anything_starts(path_with_pdsh, hostfile, config):
    done = train(path_with_pdsh, hostfile, config, CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 2
    assert "CUDA_VISIBLE_DEVICES counts for one machine only, and --hostfile" in done.stderr
    hostfile.write_text("worker-9 slots=1\n")
    done = train(path_with_pdsh, hostfile, config)
    assert done.returncode == 1
    assert "worker-9, the first machine of the hostfile, cannot be reached by ssh" in done.stderr
    folder = Path(path_with_pdsh.partition(":")[0])
    shutil.copy(shutil.which("true"), folder / "ssh")
    done = train(str(folder), hostfile, config)
    assert "it tells no address" in done.stderr
    (folder / "pdsh").unlink()
    done = train(str(folder), hostfile, config)
    assert done.returncode == 1
    assert "DeepSpeed starts other machines with pdsh, which is not installed" in done.stderr


@pytest.mark.distributed
def test_a_hostfile_trains_on_all_of_its_machines(
    path_with_pdsh, hostfile, config, tmp_path, private_folders
):
    prompts = f"training.sample_prompts={json.dumps([ODD])}"
    run = tmp_path / "a run"
    done = train(path_with_pdsh, hostfile, config, "--run", run, "--unet", 1, "--set", prompts)
    assert done.returncode == 0, done.stderr
    told = json.loads((run / "config.json").read_text())
    assert told["training"]["sample_prompts"] == [ODD]
    manifest, *_ = run.glob("unet1/step_*/manifest.json")
    assert json.loads(manifest.read_text())["processes"] == 2
