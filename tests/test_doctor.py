"""`imagen-scale doctor`: what it sees, what it makes of it, and how it ends."""

import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from rich.console import Console

from imagen_scale.commands.doctor import machine, software
from imagen_scale.commands.doctor.examination import as_dict, examine, print_findings, worst
from imagen_scale.commands.doctor.finding import Finding, examined
from imagen_scale.commands.main import main
from imagen_scale.models import host
from imagen_scale.planning.machine import this_machine

OK, WARNING = Finding("a", "ok", "fine"), Finding("b", "warning", "slow", "do this")
PROBLEM = Finding("c", "problem", "broken [red]x[/]", "do that")
GIB = 2**30


def one(findings):
    (finding,) = findings
    return finding


def test_every_thing_named_by_the_documents_is_examined():
    findings = list(examine())
    names = {finding.name for finding in findings}
    assert {
        "Python", "torch", "NVIDIA driver", "RAM", "pinned memory", "disk", "compiler",
        "Python headers", "ninja", "DeepSpeed", "operator cpu_adam", "ONNX Runtime",
        "TensorRT-RTX", "OpenVINO", "bitsandbytes", "text encoder",
    } <= names  # fmt: skip
    assert all(finding.remedy for finding in findings if finding.state != "ok")
    assert all("\n" not in finding.seen for finding in findings)


def test_the_command_gives_json_and_exit_code_1_on_a_problem(monkeypatch):
    done = CliRunner().invoke(main, ["doctor", "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == (report["state"] == "problem")
    assert set(report["findings"][0]) == {"name", "state", "seen", "remedy"}
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    compiler = one(found for found in report["findings"] if found["name"] == "compiler")
    assert (report["state"], compiler["state"]) == ("problem", "problem")
    assert "no-such-compiler" in compiler["seen"]
    assert "apt install g++" in compiler["remedy"]


def test_piped_output_is_one_plain_line_for_each_finding():
    done = subprocess.run(
        [sys.executable, "-c", "from imagen_scale.commands.main import main; main()", "doctor"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "\x1b" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.split()[0] in ("ok", "warning", "problem") for line in lines), done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_table_shows_what_was_seen_as_it_is(is_terminal):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=80, no_color=True)
    print_findings([OK, WARNING, PROBLEM], console)
    text = console.file.getvalue()
    assert "broken [red]x[/]" in text
    assert "-> do that" in text
    assert (text.count("\n") == 3) != is_terminal


def test_the_whole_is_as_its_worst_part():
    assert worst([OK]) == "ok"
    assert worst([OK, WARNING]) == "warning"
    assert as_dict([OK, PROBLEM, WARNING])["state"] == "problem"


def test_an_examination_that_fails_is_a_finding():
    def check():
        yield OK
        raise OSError("driver\nlost")

    finding = one(examined("card", check))
    assert (finding.name, finding.state) == ("card", "problem")
    assert finding.seen == "cannot be examined: OSError: driver"


def test_an_optional_package_that_is_broken_is_a_warning(monkeypatch):
    def broken(name):
        raise ImportError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(software, "_version", lambda name: None if "-gpu" in name else "1.0")
    monkeypatch.setattr(software, "importlib", SimpleNamespace(import_module=broken))
    found = {finding.name: finding for finding in examine()}
    for name in ("TensorRT-RTX", "OpenVINO", "bitsandbytes"):
        assert found[name].state == "warning"
        assert "cannot open shared object file" in found[name].seen


@pytest.mark.parametrize(("version", "state"), [("0.19.8", "problem"), (None, "warning")])
def test_what_only_training_needs_is_no_problem_without_deepspeed(monkeypatch, version, state):
    monkeypatch.setattr(software, "_version", lambda name: version)
    monkeypatch.setattr(software.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(software.sysconfig, "get_path", lambda name: "/nowhere")
    findings = list(software.compiler())
    assert [finding.name for finding in findings] == ["compiler", "Python headers", "ninja"]
    assert {finding.state for finding in findings} == {state}


@pytest.mark.parametrize(
    ("free", "capability", "state", "said"),
    [
        (11 * GIB, (8, 6), "ok", ""),
        (11 * GIB, (7, 5), "warning", "precision at auto"),
        (3 * GIB, (8, 6), "warning", "nvidia-smi"),
    ],
)
def test_cards(free, capability, state, said):
    finding = machine.card(0, "RTX 3060", free, 12 * GIB, capability)
    assert finding.state == state
    assert said in finding.remedy
    assert f"{free / GIB:.1f} of 12.0 GiB free" in finding.seen


def test_a_driver_without_a_card_for_torch(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "nvidia_driver", lambda: "580.95")
    for cuda, said in ((None, "built for the CPU"), ("13.0", "finds no card")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        finding = list(machine.torch_and_cards())[1]
        assert finding.state == "problem"
        assert said in finding.seen


def test_memory_of_a_container_counts(monkeypatch, tmp_path):
    """For the plan of a training, too; what its kernel keeps of files can be had back."""
    for name, value in (
        ("memory.max", 6 * GIB), ("memory.current", 4 * GIB),
        ("memory.stat", f"anon 5\ninactive_file {2 * GIB}"),
    ):  # fmt: skip
        (tmp_path / name).write_text(f"{value}\n")
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    assert host.host_memory().total == 6 * GIB
    assert 3 * GIB < host.host_memory().available <= 4 * GIB
    assert this_machine(1).ram <= 4 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    assert host.host_memory().total > 6 * GIB
    (tmp_path / "memory.max").write_text(f"{6 * GIB}\n")
    finding = one(machine.ram())
    assert finding.state == "warning"
    assert "of 6.0 GiB" in finding.seen


def test_wsl_is_told_that_memory_is_not_pinned(monkeypatch):
    assert one(machine.pinned_memory()).state == "ok"
    monkeypatch.setattr(machine.platform, "release", lambda: "6.6-microsoft-standard-WSL2")
    finding = one(machine.pinned_memory())
    assert finding.state == "warning"
    assert ".wslconfig" in finding.remedy


def test_disk(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    for free, state in ((50 * GIB, "ok"), (10 * GIB, "warning"), (GIB, "problem")):
        monkeypatch.setattr(
            machine.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free)
        )
        assert one(machine.disk({"runs": tmp_path / "not" / "yet"})).state == state
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    assert "may not be written" in one(machine.disk({"runs": tmp_path})).seen


def test_both_onnx_runtimes_are_a_problem(monkeypatch):
    monkeypatch.setattr(software, "_version", lambda name: "1.0")
    assert "overwrite each other" in one(software.onnxruntime()).seen


def test_optional_packages_that_are_missing_are_no_problem(monkeypatch):
    monkeypatch.setattr(software, "_version", lambda name: None)
    for check in (software.onnxruntime, software.tensorrt, software.openvino,
                  software.bitsandbytes):  # fmt: skip
        finding = one(check())
        assert (finding.state, finding.seen[:13]) == ("ok", "not installed")
        assert "pip install" in finding.remedy
    assert one(software.deepspeed(None)).state == "warning"


def test_the_text_encoder_of_the_configuration_is_looked_for(tiny_config):
    def encoder(*arguments):
        done = CliRunner().invoke(main, ["doctor", "--json", *arguments])
        findings = json.loads(done.stdout)["findings"]
        return one(found for found in findings if found["name"] == "text encoder")

    assert encoder("--config", str(tiny_config))["state"] == "ok"
    config = json.loads(tiny_config.read_text())
    config["text"] = {"encoder": "no-such/encoder"}
    tiny_config.write_text(json.dumps(config))
    found = encoder("--config", str(tiny_config))
    assert (found["state"], found["seen"]) == ("problem", "no-such/encoder: not on this machine")
    assert "imagen-scale prepare" in found["remedy"]


def test_the_disk_of_the_configurations_run_is_looked_at(tiny_config, tmp_path):
    config = json.loads(tiny_config.read_text())
    config["logging"] = {"run_dir": str(tmp_path / "far" / "away")}
    tiny_config.write_text(json.dumps(config))
    done = CliRunner().invoke(main, ["doctor", "--json", "--config", str(tiny_config)])
    findings = json.loads(done.stdout)["findings"]
    assert f"for runs in {tmp_path}" in one(f for f in findings if f["name"] == "disk")["seen"]


def test_a_wrong_configuration_ends_with_exit_code_2(tiny_config):
    tiny_config.write_text("{}")
    done = CliRunner().invoke(main, ["doctor", "--config", str(tiny_config)])
    assert done.exit_code == 2
    assert "imagen: this key is required" in done.stderr


def test_operators_are_compiled_on_demand_and_locks_of_killed_builds_removed(
    tmp_path, process_group
):
    """The objects of the session's build are there, so that only the library is made anew."""
    from imagen_scale.training.operators import extensions_dir

    folder = tmp_path / "extensions"
    for name in ("cpu_adam", "deepspeed_shm_comm"):
        built = extensions_dir() / name
        if built.is_dir():
            shutil.copytree(built, folder / name)
            (folder / name / f"{name}.so").unlink(missing_ok=True)
    (folder / "cpu_adam").mkdir(parents=True, exist_ok=True)
    (folder / "cpu_adam" / "lock").touch()

    def doctor(*options):
        done = subprocess.run(
            [sys.executable, "-c", "from imagen_scale.commands.main import main; main()", "doctor",
             "--json", *options],
            capture_output=True, text=True,
            env=os.environ | {"TORCH_EXTENSIONS_DIR": str(folder)},
        )  # fmt: skip
        findings = json.loads(done.stdout)["findings"]
        return done, [found for found in findings if found["name"].startswith("operator")]

    done, findings = doctor()
    assert "removed the lock of a killed build" in findings[0]["seen"]
    assert [found["state"] for found in findings[1:]] == ["warning"] * len(findings[1:])
    assert not (folder / "cpu_adam" / "lock").exists()
    done, findings = doctor("--build")
    assert "compiling DeepSpeed's cpu_adam" in done.stderr
    assert all(found["seen"].startswith("compiled just now") for found in findings)
    assert (folder / "cpu_adam" / "cpu_adam.so").is_file()
    assert "compiling" not in doctor("--build")[0].stderr


def test_a_build_that_fails_is_a_problem_with_the_compilers_complaint(monkeypatch):
    from imagen_scale.training import operators

    class Builder:
        def load(self, verbose):
            raise RuntimeError("error: no space left on device")

    broken = operators.Operator("cpu_adam", "tests", False, Builder())
    monkeypatch.setattr(operators, "operators", lambda: [broken])
    finding = list(software.deepspeed(print))[-1]
    assert (finding.name, finding.state) == ("operator cpu_adam", "problem")
    assert "no space left" in finding.seen
    assert "try again" in finding.remedy


def test_a_program_that_is_no_compiler_is_a_problem(monkeypatch):
    assert next(software.compiler()).state == "ok"
    monkeypatch.setenv("CXX", "/bin/true")
    found = next(software.compiler())
    assert found.state == "problem" and "/bin/true is no C++ compiler" in found.seen
