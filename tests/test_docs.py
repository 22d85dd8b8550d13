"""The documents: every command in them can be called, and the site builds without a network."""

import ast
import doctest
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support import ROOT, plan_table
from support.doc_commands import BLOCK, DOCUMENTS, Checker, Command, commands

from imagen_scale.commands.main import main
from imagen_scale.planning.cache import plan_dir


def every_command(called=main, path=()):
    yield path, called
    for name, child in getattr(called, "commands", {}).items():
        yield from every_command(child, (*path, name))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_can_be_called_as_it_is_written(document):
    checker, wrong = Checker(), []
    for command in commands(document):
        try:
            checker.check(command)
        except (Exception, SystemExit) as error:
            wrong.append(f"{command}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_the_documents_hold_commands_of_every_kind():
    found = [command for document in DOCUMENTS for command in commands(document)]
    programs = {command.words[0] for command in found}
    assert {"imagen-scale", "deepspeed", "torchrun", "srun", "make", "python", "pip"} <= programs
    assert len(found) > 60


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("imagen-scale smaple x", "no command 'smaple'"),
        ("imagen-scale sample x --stesp 5", "--stesp"),
        ("imagen-scale plan --memory 12GB", "--config"),
        ("imagen-scale plan --config configs/none.json", "none.json"),
        ("imagen-scale plan --config configs/emoji_demo.json --set data.fliq=true", "fliq"),
        ("deepspeed launch/train.py --config configs/emoji_demo.json --unit 1", "--unit"),
        ("deepspeed launch/trian.py --config configs/emoji_demo.json", "trian.py"),
        ("torchrun --nproc_per_node 2 launch/train.py", "--config"),
        ("srun python launch/train.py --config configs/none.json", "none.json"),
        ("make dmeo", "no target dmeo"),
        ("pip install '.[trian]'", "no extra trian"),
        ("python benchmarks/faults.py --wirte docs/reliability.md", "--wirte"),
    ],
)
def test_a_misspelt_command_is_found(line, error):
    with pytest.raises((Exception, SystemExit), match=error) as caught:
        try:
            Checker().check(Command(shlex.split(line), "here"))
        except click.UsageError as wrong:
            raise AssertionError(wrong.format_message()) from wrong
    assert caught.value is not None


@pytest.mark.parametrize("path", [path for path, _ in every_command()], ids=" ".join)
def test_every_help_opens_and_its_examples_can_be_called(path):
    called = dict(every_command())[path]
    done = CliRunner().invoke(main, [*path, "--help"])
    assert done.exit_code == 0 and done.output.startswith("Usage:")
    for line in (called.help or "").splitlines():
        if line.strip().startswith("imagen-scale "):
            Checker().check(Command(shlex.split(line, comments=True), "help of " + " ".join(path)))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_name_what_there_is(document):
    for block in BLOCK.finditer(document.read_text(encoding="utf-8")):
        if block[1] != "python":
            continue
        for node in ast.walk(ast.parse(block[2])):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for name in node.names:
                    if not hasattr(module, name.name):
                        importlib.import_module(f"{node.module}.{name.name}")
            elif isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)


SHOWN = [command for document in DOCUMENTS for command in commands(document)
         if command.output is not None]  # fmt: skip


@pytest.fixture(scope="module")
def fresh_cache(tmp_path_factory):
    """Without what a card of this machine was measured at, which would change a plan.

    What the planner found on tensors without memory takes a minute and is kept for other tests.
    """
    shared, own = plan_dir(), tmp_path_factory.mktemp("cache")

    def copy(source, target):
        target.mkdir(parents=True, exist_ok=True)
        for file in source.glob("*.json"):
            if file.name != "calibration.json":
                shutil.copy(file, target)

    copy(shared, own / "plan")
    yield own
    copy(own / "plan", shared)


@pytest.mark.parametrize("command", SHOWN, ids=str)
def test_outputs_shown_are_what_the_commands_print(command, monkeypatch, fresh_cache):
    """To write those of `plan` anew: python tests/refresh_docs.py."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("IMAGEN_SCALE_CACHE", str(fresh_cache))
    done = CliRunner().invoke(main, command.words[1:])
    assert done.exit_code == 0, done.output
    printed = "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())
    assert doctest.OutputChecker().check_output(command.output, printed, doctest.ELLIPSIS), printed


def test_the_readme_shows_what_is_planned(monkeypatch, fresh_cache):
    """To write it anew: python tests/refresh_docs.py."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("IMAGEN_SCALE_CACHE", str(fresh_cache))
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert plan_table.refreshed(page) == page


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    mkdocs = Path(sys.executable).with_name("mkdocs")
    done = subprocess.run(
        [mkdocs, "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 12
    for page in [*pages, *tmp_path.rglob("*.css")]:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe)[^>]*src="https?:[^"]*"', text)
        fetched += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*https?:', text)
        fetched += re.findall(r"@import[^;]*https?:|url\(\s*['\"]?https?:", text)
        assert not fetched, (page, fetched)


def test_the_readme_names_every_document():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"docs/(\w+)\.md", text))
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= named
