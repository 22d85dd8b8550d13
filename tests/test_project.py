"""The project itself: lint, types, import directions, start-up, what it says about itself."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support import ROOT

BIN = Path(sys.executable).parent


def run(*command, cwd=ROOT):
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command", ["ruff check .", "ruff format --check .", "mypy", "lint-imports", "codespell"]
)
def test_house_rules_are_run_beside_the_tests(command):
    """By `make test`; they take as long as some hundred tests."""
    planned = run("make", "--dry-run", "test", "VENV=venv", "PYTHON=python3").stdout
    assert f"venv/bin/{command}" in planned
    assert "python -m pytest -n 3 --dist loadfile" in planned


def test_no_test_imports_a_conftest_or_another_test():
    """What tests share is in tests/support, which imports neither."""
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        found = re.findall(
            r"^\s*(?:from|import)\s+(conftest|(?:tests\.)?test_\w+)", path.read_text(), re.M
        )
        assert not found, f"{path}: {found}"


def test_help_imports_neither_torch_nor_deepspeed():
    code = (
        "import sys; from click.testing import CliRunner;"
        "from imagen_scale.commands.main import main;"
        "assert all(CliRunner().invoke(main, [name, '--help']).exit_code == 0"
        " for name in main.commands);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'deepspeed', 'transformers')))"
    )
    assert run(sys.executable, "-c", code).returncode == 0


def test_only_training_imports_deepspeed():
    for path in (ROOT / "imagen_scale").rglob("*.py"):
        if path.parent.name != "training":
            assert not re.search(r"^\s*(import|from) deepspeed", path.read_text(), re.M), path


def test_files_are_loaded_without_running_code():
    """Every torch.load says weights_only=True; nothing unpickles."""
    for path in [
        *(ROOT / "imagen_scale").rglob("*.py"),
        *(ROOT / "export").rglob("*.py"),
        *(ROOT / "launch").glob("*.py"),
    ]:
        text = path.read_text()
        for call in re.findall(r"torch\.load\((.*?)\)", text.replace("`torch.load`", "")):
            assert "weights_only=True" in call, path
        assert not re.search(r"^\s*(import|from) (pickle|dill|cloudpickle)", text, re.M), path


def test_launch_script_is_short_and_shadows_no_module():
    assert len((ROOT / "launch" / "train.py").read_text().splitlines()) < 80
    assert [path.name for path in (ROOT / "launch").glob("*.py")] == ["train.py"]


def test_no_module_of_the_export_package_bears_a_real_modules_name():
    names = {path.stem for path in (ROOT / "export" / "imagen_scale_export").glob("*.py")}
    assert not names & ({"onnx", "tensorrt", "openvino", "torch"} | sys.stdlib_module_names)


def test_constraints_name_no_host():
    text = (ROOT / "constraints.txt").read_text()
    assert "torch==2.13.0\n" in text
    assert not re.search(r"https?:|--|\+cpu| @ ", text)


def test_the_wheel_works_without_the_repository(tmp_path):
    done = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q",
               "-w", tmp_path, ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", target, wheel)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import imagen_scale.commands.main as c;"
        f"import imagen_scale_export.exporter as r; assert r.__file__.startswith({str(target)!r});"
        f"assert c.__file__.startswith({str(target)!r}); "
        "from importlib.resources import files; folder = files('imagen_scale.report');"
        "assert all((folder / f'page.{kind}').is_file() for kind in ('html', 'css', 'js'));"
        "c.main(['--version'])"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0.1.0" in done.stdout
    # What is found by name: the processes of `train`, and the page of `report`.
    files = {path.relative_to(target / "imagen_scale").as_posix()
             for path in (target / "imagen_scale").rglob("*")}  # fmt: skip
    assert {"commands/train_process.py", "report/page.html", "ui/page.css", "py.typed"} <= files


def sources():
    return [path for folder in ("imagen_scale", "export", "launch")
            for path in (ROOT / folder).rglob("*.py")]  # fmt: skip


def test_files_and_classes_stay_small():
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 200, (path, node.name)


def test_this_machines_address_stands_in_one_place():
    assert [path.name for path in sources() if '"127.0.0.1"' in path.read_text("utf-8")] == [
        "network.py"
    ]


def test_no_import_is_hidden_from_the_contract():
    for path in sources():
        for call in re.findall(r"(?:import_module|__import__)\(([^)]*)\)", path.read_text("utf-8")):
            assert "imagen_scale" not in call, (path, call)


def test_contributing_draws_the_floors_that_are_checked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = [contract["layers"] for contract in project["tool"]["importlinter"]["contracts"]
                 if contract["type"] == "layers"]  # fmt: skip
    lines = "\n".join(
        layer.replace("imagen_scale_export", "export").replace("imagen_scale.", "")
        for layer in layers
    )
    assert len(layers) == 6
    assert f"```\n{lines}\n```" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
