"""Where things are kept: one rule, and one sentence where it cannot be kept there."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import stranger
from support.tiny import TINY

from imagen_scale.commands.doctor.finding import examined
from imagen_scale.commands.main import main
from imagen_scale.commands.train_process import run_folder
from imagen_scale.config import parse_config
from imagen_scale.files.caches import (
    LIBRARIES,
    cache_root,
    cannot_write,
    expanded,
    hub_home,
    operators_dir,
)

needs_stranger = pytest.mark.skipif(bool(stranger.why_not()), reason=str(stranger.why_not()))
SETTLED = (
    "import os, json; from imagen_scale.files.caches import settle_caches; settle_caches(); "
    "print(json.dumps(dict(os.environ)))"
)


@pytest.fixture
def locked_home(tmp_path):
    """A home that may not be written."""
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    return home


@pytest.mark.parametrize(
    ("variables", "root", "hub"),
    [
        ({}, "/h/.cache/imagen-scale", "/h/.cache/huggingface"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/imagen-scale", "/x/huggingface"),
        ({"XDG_CACHE_HOME": "/x", "IMAGEN_SCALE_CACHE": "/i"}, "/i", "/x/huggingface"),
        ({"IMAGEN_SCALE_CACHE": "~/i", "HF_HOME": "/f"}, "/h/i", "/f"),
        ({"IMAGEN_SCALE_CACHE": ""}, "/h/.cache/imagen-scale", "/h/.cache/huggingface"),
    ],
)
def test_where_things_are_kept(monkeypatch, variables, root, hub):
    for name in ("XDG_CACHE_HOME", "IMAGEN_SCALE_CACHE", "HF_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/h"} | variables).items():
        monkeypatch.setenv(name, value)
    assert (str(cache_root()), str(hub_home())) == (root, hub)
    assert str(operators_dir()).startswith(f"{root}/torch_extensions/")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/e")
    assert str(operators_dir()) == "/e"


def test_a_home_is_put_in_where_there_is_one(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    found = {path: str(expanded(path)) for path in ("~", "~/x", "x/~", "~nobody-here/x")}
    assert found == {"~": "/h", "~/x": "/h/x", "x/~": "x/~", "~nobody-here/x": "~nobody-here/x"}
    assert expanded(Path("~/x")) == Path("/h/x")
    config = parse_config(json.dumps(TINY), overrides=("logging.run_dir=~/x",))
    assert run_folder(config, "tiny.json", None) == Path("/h/x")
    assert run_folder(config, "tiny.json", "given") == Path("given")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("data.path={}", "data.names=null", "data.source=folder"), "data.path: '{}' is not a"),
        (("data.path={}", "data.names=null", "data.source=webdataset"), "data.path: '{}'"),
        (("data.path={}", "data.names=null", "data.source=huggingface"), "the data set '{}'"),
        (("data.cache_dir={}",), "data.cache_dir: '{}': there is no home ~nobody-here here"),
        (("imagen.text_encoder_name={}",), "'{}' is no local folder"),
    ],
)
def test_a_home_that_is_not_there_is_one_sentence(tiny_config, tmp_path, monkeypatch, changes,
                                                  message):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    named = "~nobody-here/x"
    changes = [f"data.cache_dir={tmp_path / 'cache'}", *changes]
    words = [word for change in changes for word in ("--set", change.format(named))]
    done = CliRunner().invoke(main, ["prepare", "--config", str(tiny_config), *words])
    assert done.exit_code == 2, done.output
    assert message.format(named) in done.output and done.output.count("\n") == 1
    assert not list(tmp_path.glob("~*"))


def test_room_is_the_remedy_of_a_full_disk_only():
    full, denied = (
        str(cannot_write("/c", OSError(number, os.strerror(number)), "data.cache_dir"))
        for number in (28, 13)
    )
    ending = "set data.cache_dir (or IMAGEN_SCALE_CACHE) to a folder that can be written."
    assert full == f"/c: cannot be written: No space left on device; free disk space, or {ending}"
    assert denied == f"/c: cannot be written: Permission denied; {ending}"


def test_a_permission_is_not_mended_by_installing_again():
    def denied():
        raise PermissionError(13, "Permission denied", "/c")

    def broken():
        raise ImportError("no symbol")

    assert "IMAGEN_SCALE_CACHE" in examined("x", denied)[0].remedy
    assert "Install the package again" not in examined("x", denied)[0].remedy
    assert "Install the package again" in examined("x", broken)[0].remedy


@needs_stranger
def test_libraries_follow_where_the_home_takes_nothing(locked_home, tmp_path):
    root = tmp_path / "cache"
    found = json.loads(stranger.run(SETTLED, HOME=locked_home, IMAGEN_SCALE_CACHE=root).stdout)
    for variable in LIBRARIES:
        assert found[variable] == str(root / variable.lower())
    assert found["HOME"] == str(locked_home)
    own = json.loads(
        stranger.run(SETTLED, HOME=locked_home, IMAGEN_SCALE_CACHE=root, HF_HOME="/hub").stdout
    )
    assert own["HF_HOME"] == "/hub"  # the user's word


@needs_stranger
def test_libraries_are_left_alone_where_they_can_write_or_something_lies(locked_home, tmp_path):
    home, root = tmp_path / "open", tmp_path / "cache"
    home.mkdir()
    found = json.loads(stranger.run(SETTLED, HOME=home, IMAGEN_SCALE_CACHE=root).stdout)
    assert not set(LIBRARIES) & set(found)
    locked_home.chmod(0o755)
    (locked_home / ".cache" / "huggingface").mkdir(parents=True)
    for folder in (locked_home / ".cache" / "huggingface", locked_home / ".cache", locked_home):
        folder.chmod(0o555)
    found = json.loads(stranger.run(SETTLED, HOME=locked_home, IMAGEN_SCALE_CACHE=root).stdout)
    assert "HF_HOME" not in found  # models that lie there are read
    assert "MPLCONFIGDIR" in found


@needs_stranger
def test_without_a_home_and_a_name(tmp_path):
    found = json.loads(stranger.run(SETTLED, IMAGEN_SCALE_CACHE=tmp_path / "cache").stdout)
    assert found["HOME"] == "/"
    done = stranger.run("from imagen_scale.files.caches import cache_root; print(cache_root())")
    assert done.stdout == "/.cache/imagen-scale\n"


@needs_stranger
def test_preparing_names_the_variable(locked_home):
    code = """
from imagen_scale.commands.errors import user_errors
from imagen_scale.data.storage import exclusive
from imagen_scale.files.caches import cache_root

@user_errors
def prepare():
    with exclusive(cache_root() / "images" / "x.lock"):
        print("locked")

prepare()
"""
    done = stranger.run(code, HOME=locked_home)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {locked_home}/.cache/imagen-scale/images: cannot be written: Permission denied; "
        "set data.cache_dir (or IMAGEN_SCALE_CACHE) to a folder that can be written.\n"
    )
    done = stranger.run(code, HOME=locked_home, IMAGEN_SCALE_CACHE=locked_home.with_name("cache"))
    assert done.stdout == "locked\n"


@needs_stranger
def test_operators_and_the_doctor_say_it_in_the_same_words(locked_home):
    code = """
from imagen_scale.commands.doctor.machine import caches
from imagen_scale.errors import EnvironmentProblem
from imagen_scale.training.operators import check_extensions_dir
try:
    check_extensions_dir()
except EnvironmentProblem as error:
    print(error)
for finding in caches():
    print(*finding, sep="|")
"""
    done = stranger.run(code, HOME=locked_home)
    told, data, operators, hub = done.stdout.splitlines()
    remedy = "et TORCH_EXTENSIONS_DIR (or IMAGEN_SCALE_CACHE) to a folder that can be written."
    seen, _, said = told.partition("; ")
    assert said == f"s{remedy}"
    assert operators == f"caches|problem|{seen}|S{remedy}"
    assert data.startswith(f"caches|problem|{locked_home}/.cache/imagen-scale: cannot be written")
    assert data.endswith("|Set IMAGEN_SCALE_CACHE to a folder that can be written.")
    assert hub.startswith("caches|warning|") and "HF_HOME" in hub
