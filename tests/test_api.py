"""The Python interface: from a run to pictures in few lines, and the list of what is public."""

import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT, write_stage
from PIL import Image

import imagen_scale
from imagen_scale import Cascade, ImagenScaleError
from imagen_scale.cascade import to_uint8
from imagen_scale.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_stage(folder, 1)
    write_stage(folder, 2)
    return folder


def test_from_a_run_to_pictures(run):
    pictures = Cascade.load(run).sample(["red heart", "sun"], seed=3, num=2, steps=2)
    assert [(type(one), one.size, one.mode) for one in pictures] == [
        (Image.Image, (32, 32), "RGB")
    ] * 4
    stages = Cascade.load(run).sample_stages(["red heart", "sun"], seed=3, num=2, steps=2)
    assert np.array_equal(np.stack([np.asarray(one) for one in pictures]), to_uint8(stages[-1]))


def test_it_gives_the_pixels_that_the_command_writes(run, tmp_path):
    (ours,) = Cascade.load(run).sample(["sun"], seed=5, steps=2)
    done = CliRunner().invoke(
        main, ["sample", "sun", "--seed", "5", "--steps", "2", "--run", str(run),
               "--runtime", "torch", "--out", str(tmp_path)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (file,) = tmp_path.glob("00001_*.png")
    with Image.open(file) as theirs:
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_one_text_in_place_of_a_list_is_refused(run):
    with pytest.raises(ImagenScaleError, match=r"give a list, \['red heart'\]"):
        Cascade.load(run).sample("red heart")


def test_importing_the_package_is_light():
    code = (
        "import sys, imagen_scale;"
        "heavy = {'torch', 'pydantic', 'numpy', 'PIL', 'click'} & set(sys.modules);"
        "assert not heavy, heavy; imagen_scale.load_config; assert 'torch' not in sys.modules;"
        "from imagen_scale import Cascade; assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'Casacde'"):
        imagen_scale.Casacde  # noqa: B018
    assert set(imagen_scale.__all__) <= set(dir(imagen_scale))


def test_the_document_lists_every_public_name_and_no_other():
    text = (ROOT / "docs" / "api.md").read_text()
    tables = re.split(r"^## ", text, flags=re.M)[1:]
    listed = [set(re.findall(r"^\| `([\w.]+)` \|", table, re.M)) for table in tables]
    assert listed[0] == set(imagen_scale.__all__)
    members = {
        f"Cascade.{name}"
        for name, member in inspect.getmembers(Cascade)
        if not name.startswith("_") and callable(member)
    }
    assert {name for name in listed[1] if "." in name} == members
    for name in imagen_scale.__all__:
        if name != "__version__":
            assert getattr(imagen_scale, name).__doc__, name


def test_the_readme_shows_it_in_ten_lines():
    text = (ROOT / "README.md").read_text()
    code = re.search(r"## In Python\n\n```python\n(.*?)```", text, re.S)[1]
    assert len(code.splitlines()) <= 10


def test_the_readmes_lines_run(run, tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    code = re.search(r"## In Python\n\n```python\n(.*?)```", text, re.S)[1]
    code = code.replace("runs/emoji_demo", str(run)).replace("[25, 10]", "[2, 1]")
    code = code.replace("num=100", "num=2").replace("seed=0)", "seed=0, steps=1)")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "heart.png").is_file()
