"""The commands as a whole: help, misspellings, exit codes, plain output, interruption."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import psutil
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from support import ROOT
from support.environment import LAUNCHER_VARIABLES
from support.tiny import TINY, write_stage

from imagen_scale.commands import launcher
from imagen_scale.commands.main import main
from imagen_scale.commands.train import saved_processes
from imagen_scale.config import Config
from imagen_scale.config.reference import reference
from imagen_scale.config.section import Section
from imagen_scale.errors import UsageError
from imagen_scale.runs.folders import find_run, metrics_path
from imagen_scale.runs.inference import INFERENCE_FORMAT
from imagen_scale.runs.progress import find_runs
from imagen_scale.runs.records import read_metrics

COMMAND = [sys.executable, "-c", "from imagen_scale.commands.main import main; main()"]


def cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def leaves(called=main, path=()):
    if not isinstance(called, click.Group) or called.invoke_without_command:
        yield path, called
    for name, child in getattr(called, "commands", {}).items():
        yield from leaves(child, (*path, name))


# Help and misspellings.


@pytest.mark.parametrize(("path", "command"), leaves(), ids=lambda value: " ".join(value) if
                         isinstance(value, tuple) else "")  # fmt: skip
def test_every_help_has_an_example(path, command):
    assert f"imagen-scale {' '.join(path)}" in command.help


def test_the_list_of_commands_fits_and_stands_in_the_order_of_use():
    text = cli("--help").output
    names = re.findall(r"^  ([\w-]+)  +\S", text.partition("Commands:")[2], re.M)
    assert names[:3] == ["doctor", "init", "config"]
    assert names.index("train") < names.index("sample") < names.index("export")
    assert "..." not in text.partition("Commands:")[2]


def test_the_document_lists_every_command():
    text = (ROOT / "docs" / "commands.md").read_text()
    listed = set(re.findall(r"^\| `imagen-scale ([\w-]+)` \|", text, re.M))
    assert listed == set(main.commands)


@pytest.mark.parametrize(
    ("line", "meant"),
    [("smaple sun", "'sample'"), ("config chek x", "'check'"), ("runs --jsno", "'--json'")],
)
def test_a_misspelt_command_or_option_is_answered_with_the_right_one(line, meant):
    done = cli(*line.split())
    assert done.exit_code == 2
    assert "ean" in done.stderr and meant in done.stderr


def test_a_run_is_found_by_folder_and_by_name_and_a_misspelt_one_answered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("emoji_demo", "faces"):
        write_stage(tmp_path / "runs" / name, 1)
    assert find_run("emoji_demo") == Path("runs/emoji_demo")
    assert find_run("runs/faces") == Path("runs/faces")
    with pytest.raises(UsageError, match=r"Did you mean runs/emoji_demo\? Runs under runs: emoji"):
        find_run("runs/emojy_demo")
    done = cli("sample", "sun", "--run", "emojy_demo")
    assert done.exit_code == 2
    assert "runs/emoji_demo" in done.stderr


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("do", ["doctor"]),
        ("config re", ["reference"]),
        ("sample --ste", ["--steps"]),
        ("sample --runtime on", ["onnx"]),
        ("sample --sampler he", ["heun"]),
        ("sample --sampler ddim,dpmpp", ["ddim,dpmpp_2m", "ddim,dpmpp_2m_sde"]),
    ],
)
def test_shell_completion(line, completed):
    environment = os.environ | {
        "_IMAGEN_SCALE_COMPLETE": "bash_complete", "COMP_WORDS": f"imagen-scale {line}",
        "COMP_CWORD": str(len(line.split())),
    }  # fmt: skip
    code = "from imagen_scale.commands.main import main; main(prog_name='imagen-scale')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                          text=True)  # fmt: skip
    assert done.stdout.split() == [f"plain,{word}" for word in completed]


# Configurations.


def test_the_reference_document_is_up_to_date():
    """To write it anew: imagen-scale config reference > docs/configuration.md."""
    assert cli("config", "reference").output == (ROOT / "docs" / "configuration.md").read_text()


def test_the_reference_explains_every_key():
    text = reference()
    homes = {f"imagen_scale.config.{name}" for name in ("schema", "sections", "network")}
    sections = [section for section in Section.__subclasses__() if section.__module__ in homes]
    assert Config in sections and len(sections) > 6
    for section in sections:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            assert f"| `{name}` |" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(cell.strip() for row in rows for cell in row.strip("|").split(" | ")), rows


def test_config_show_writes_every_default_out(tiny_config, tmp_path):
    done = cli("config", "show", tiny_config, "--set", "training.seed=7")
    shown = json.loads(done.output)
    assert (shown["training"]["seed"], shown["training"]["betas"]) == (7, [0.9, 0.99])
    write_stage(tmp_path / "run", 1)
    assert json.loads(cli("config", "show", "--run", tmp_path / "run").output)["imagen"]
    for arguments in ((), (tiny_config, "--run", tmp_path / "run")):
        done = cli("config", "show", *arguments)
        assert (done.exit_code, "one of the two" in done.stderr) == (2, True)


# Warnings.


def test_a_warning_is_a_line_and_those_of_others_say_where():
    code = """
import warnings
from imagen_scale.commands.errors import user_errors

@user_errors
def command():
    warnings.warn("data.path: 1 of 8 pictures is not used", stacklevel=2)
    warnings.warn("of a library", DeprecationWarning)

command()
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    ours, theirs, *_ = done.stderr.splitlines()
    assert ours == "warning: data.path: 1 of 8 pictures is not used"
    assert theirs == "<string>:8: DeprecationWarning: of a library"


# Runs.


@pytest.fixture
def root(tmp_path):
    """Runs: one trained, one half way, one with a configuration that is no longer valid."""
    root = tmp_path / "runs"
    for number in (1, 2):
        write_stage(root / "whole", number)
    write_stage(root / "half", 1, step=4)
    lines = [{"unet": 1, "step": step, "loss": 1 / step} for step in (1, 2, 5)]
    lines.insert(2, {"unet": 1, "step": 2, "val_loss": 0.7})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"unet": 1, "st'
    (root / "half" / "unet1" / "metrics.jsonl").write_text(text)
    (root / "half" / "unet1" / "step_00000003").mkdir()
    (root / "half" / "samples").mkdir()
    (root / "half" / "samples" / "unet1_step_00000003.png").touch()
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{}")
    return root


def test_runs_tells_how_far_each_stage_is(root):
    found = {Path(run["run"]).name: run for run in json.loads(
        cli("runs", "--root", root, "--json").output)}  # fmt: skip
    whole, half, broken = found["whole"], found["half"], found["broken"]
    assert [stage["is_finished"] for stage in whole["stages"]] == [True, True]
    one, two = half["stages"]
    assert (one["step"], one["steps"], one["loss"], one["val_loss"]) == (5, 6, 0.2, 0.7)
    assert (one["checkpoints"], one["is_finished"]) == ([3], False)
    assert (two["step"], two["loss"], two["size"]) == (0, None, 32)
    assert half["picture"].endswith("unet1_step_00000003.png")
    assert "imagen: this key is required" in broken["problem"]


def test_what_is_damaged_in_a_run_keeps_none_from_being_listed(root):
    (root / "half" / "samples" / "unet1_step_00000006.png").symlink_to("gone.png")
    file = root / "whole" / "unet1" / "inference.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata={"format": INFERENCE_FORMAT})  # and no facts
    done = cli("runs", "--root", root, "--json")
    assert done.exit_code == 0, done.output
    found = {Path(run["run"]).name: run for run in json.loads(done.output)}
    assert set(found) == {"whole", "half", "broken"}
    assert [stage["is_finished"] for stage in found["whole"]["stages"]] == [False, True]
    assert found["half"]["picture"].endswith("unet1_step_00000003.png")


def test_runs_is_plain_where_it_is_piped(root):
    done = subprocess.run([*COMMAND, "runs", "--root", root], capture_output=True, text=True)
    assert "\x1b" not in done.stdout
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert {len(row) for row in rows} == {8}
    half = [row for row in rows if row[0] == "half"]
    assert [row[2] for row in half] == ["5/6", "0/6"]
    assert Path(half[0][7]).is_file()


def on_a_terminal(*arguments, **variables):
    """What a command writes to a terminal."""
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CI")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "160"} | variables
    master, slave = pty.openpty()
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=slave, stderr=slave,
                               env=environment)  # fmt: skip
    os.close(slave)
    text = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        text += part
    os.close(master)
    process.wait()
    return text.decode()


def test_no_color_is_respected(root):
    coloured = re.compile(r"\x1b\[[\d;]*3\d[;m]")
    assert coloured.search(on_a_terminal("runs", "--root", root))
    plain = on_a_terminal("runs", "--root", root, NO_COLOR="1")
    assert "half-trained" in plain
    assert not coloured.search(plain)


def test_the_list_of_runs_fits_a_terminal_whole(root):
    text = re.sub(r"\x1b\[[\d;?]*\w", "", on_a_terminal("runs", "--root", root, COLUMNS="80"))
    assert "…" not in text
    lines = [line.split() for line in text.splitlines()]
    assert ["half", "1:", "16", "px", "5/6", "0.2000", "0.7000", "half-trained"] in lines
    assert ["broken", "broken"] in lines
    assert "imagen: this key is required" in text
    picture = root / "half" / "samples" / "unet1_step_00000003.png"
    assert f"newest picture {picture}\n" in text.replace("\r", "")


def test_no_runs(tmp_path):
    assert cli("runs", "--root", tmp_path).exit_code == 0
    done = cli("runs", "--root", tmp_path / "none")
    assert (done.exit_code, "no such folder" in done.stderr) == (2, True)
    assert find_runs(tmp_path) == []
    assert read_metrics(metrics_path(tmp_path, 1), []).values == {}


# Training.


def test_the_launcher_gets_what_training_takes(tiny_config, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    line = ("train", "--config", tiny_config, "--dry-run", "--run", tmp_path / "run")
    words = cli(*line, "--unet", 2, "--gpus", 3, "--set", "training.seed=1", "--fresh",
                "--plan-check", 5).output.split()  # fmt: skip
    assert words[1:5] == ["-m", "deepspeed.launcher.runner", "--num_gpus", "3"]
    start = words.index("--module")
    assert words[start + 1 :] == [
        "imagen_scale.commands.train_process", "--config", str(tiny_config),
        "--run", str(tmp_path / "run"), "--set", "training.seed=1", "--unet", "2", "--fresh",
        "--plan-check", "5",
    ]  # fmt: skip


def test_the_configuration_is_given_once_by_place_or_by_option(tiny_config):
    by_place, by_option = (
        cli("train", *given, "--dry-run").output.split("--module")[1]
        for given in ((tiny_config,), ("--config", tiny_config))
    )
    assert by_place == by_option
    assert f"--config {tiny_config} " in by_place
    for given in ((), (tiny_config, "--config", tiny_config)):
        done = cli("train", *given, "--dry-run")
        assert (done.exit_code, "imagen-scale train CONFIG" in done.stderr) == (2, True)


def test_cards_that_the_environment_names_are_respected(tiny_config, monkeypatch):
    line = ("train", "--config", tiny_config, "--dry-run")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    assert "--include localhost:2,5,7 " in cli(*line).output
    assert "--include localhost:2,5 " in cli(*line, "--gpus", 2).output
    done = cli(*line, "--gpus", 4)
    assert (done.exit_code, "names 3 card(s)" in done.stderr) == (2, True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8a2f")
    assert "takes numbers of cards" in cli(*line).stderr


def test_a_run_continues_with_the_processes_it_was_started_with(tiny_config, tmp_path):
    folder = tmp_path / "run" / "unet1" / "step_00000003"
    folder.mkdir(parents=True)
    assert saved_processes(tmp_path / "run") is None  # a checkpoint without a manifest
    (folder / "manifest.json").write_text('{"processes": 2}')
    line = ("train", "--config", tiny_config, "--dry-run", "--run", tmp_path / "run")
    assert "--num_gpus 2 " in cli(*line).output
    assert "--num_gpus 1 " in cli(*line, "--fresh").output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume", "--fresh"], "exclude each other"),
        (["--unet", "3"], "U-Nets 1 to 2"),
        (["--set", "training.stesp=1"], "did you mean steps"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(tiny_config, options, message):
    done = cli("train", "--config", tiny_config, *options)
    assert done.exit_code == 2
    assert message in done.stderr


def test_the_exit_code_is_the_launchers(monkeypatch, tiny_config):
    for code, expected in ((0, 0), (1, 1), (2, 2), (143, 143)):
        monkeypatch.setattr(launcher, "run", lambda *how, code=code: code)
        assert cli("train", "--config", tiny_config).exit_code == expected


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), 9)", "sys.exit(-9)"])
def test_a_process_that_is_killed_is_a_failure_and_told(monkeypatch, tiny_config, how):
    """The launcher itself; a process below it, which the launcher tells by its exit code."""
    command = [sys.executable, "-c", f"import os, sys; {how}"]
    monkeypatch.setattr("imagen_scale.commands.launcher.launcher_command", lambda *given: command)
    done = cli("train", tiny_config)
    assert done.exit_code == 1
    assert "SIGKILL ended a training process: the computer's memory" in done.stderr


def hears_interruptions():
    """A shell starts what runs in the background deaf to them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What DeepSpeed starts, one below the other: a runner, a launcher, and the training process with a
# loader. The training process saves when it is told to end, which fails without its loader.
TREE = """
import pathlib, signal, subprocess, sys, time

def save(number, frame):
    (folder / "asked").touch()
    time.sleep(seconds)
    (folder / ("saved" if loader.poll() is None else "no loader")).touch()
    loader.kill()
    sys.exit(143)

depth, folder, seconds = int(sys.argv[1]), pathlib.Path(sys.argv[2]), float(sys.argv[3])
if depth:
    below = [sys.executable, "-c", sys.argv[4], str(depth - 1), *sys.argv[2:]]
    sys.exit(subprocess.Popen(below).wait())
loader = subprocess.Popen(["sleep", "60"])
signal.signal(signal.SIGTERM, save)
(folder / "started").touch()
while True:
    time.sleep(0.05)
"""


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start_tree(folder, seconds):
    """`launcher.run` in a process of its own, with the tree below it."""
    command = [sys.executable, "-c", TREE, "2", str(folder), str(seconds), TREE]
    code = (
        "import sys; from imagen_scale.commands.launcher import run\n"
        f"try: run({command!r})\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], preexec_fn=hears_interruptions)
    wait_for(folder / "started")
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_an_interruption_waits_until_training_has_saved(tmp_path, number):
    process, below = start_tree(tmp_path, 1.5)
    assert len(below) == 4
    process.send_signal(number)
    assert process.wait(60) == 130
    assert (tmp_path / "saved").exists()
    assert not psutil.wait_procs(below, timeout=10)[1]


def test_a_second_interruption_ends_training_at_once(tmp_path):
    process, below = start_tree(tmp_path, 600)
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "asked")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not psutil.wait_procs(below, timeout=10)[1]
    assert not (tmp_path / "saved").exists()


@pytest.mark.distributed
def test_training_is_interrupted_and_continued(tmp_path, private_folders):
    config = json.loads(json.dumps(TINY))
    config["training"] |= {"steps": 400, "checkpoint_every": 5, "sample_every": None}
    config["training"] |= {"val_every": 400}
    file, run = tmp_path / "long.json", tmp_path / "run"
    file.write_text(json.dumps(config))
    command = [*COMMAND, "train", "--config", str(file), "--run", str(run), "--unet", "1"]
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    environment |= {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=hears_interruptions,
    )  # fmt: skip
    deadline = time.monotonic() + 500
    while not list(run.glob("unet1/step_*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3  # launcher, its child, the training process
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, output + errors
    assert "the same command continues" in errors
    assert "Traceback" not in output + errors
    assert "ERROR" not in output + errors
    psutil.wait_procs(children, timeout=10)
    assert not [child for child in children if child.is_running()]

    done = subprocess.run([*command, "--resume", "--set", "training.steps=1"], env=environment,
                          text=True, capture_output=True)  # fmt: skip
    assert done.returncode == 2  # warm-up does not fit: refused before anything starts
    more = read_metrics(metrics_path(run, 1), []).last_step + 10
    done = subprocess.run([*command, "--resume", "--set", f"training.steps={more}"],
                          env=environment, text=True, capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continues at step" in done.stdout
    assert find_runs(tmp_path)[0].stages[0].is_finished


def test_an_interruption_anywhere_ends_with_130_and_no_traceback(tmp_path):
    """Also outside the commands, while modules are imported."""
    code = (
        "import imagen_scale.runs.progress as r\n"
        "def interrupted(root): raise KeyboardInterrupt\n"
        "r.find_runs = interrupted\n"
        "from imagen_scale.commands.main import main; main(['runs', '--root', '.'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=tmp_path)  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted")
