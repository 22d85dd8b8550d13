"""Sampling from Python: the command's pixels, what is refused, and the page that lists it all."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from support import ROOT, api_reference
from support.doc_commands import BLOCK
from support.tiny import write_run

import imagen_scale
from imagen_scale import Cascade, ImagenScaleError, Sample
from imagen_scale.commands.main import main
from imagen_scale.errors import UsageError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def cascade(run):
    return Cascade.load(run)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (
            ["--seed", "7", "--num", "2", "--steps", "3,2", "--cond-scale", "2,1.5",
             "--sampler", "ddim,heun", "--spacing", "linear", "--eta", "0.5,0", "--threshold",
             "0.8", "--tile", "16", "--at-once", "1"],
            {"seed": 7, "num": 2, "steps": [3, 2], "cond_scale": [2, 1.5],
             "sampler": ["ddim", "heun"], "spacing": "linear", "eta": [0.5, 0], "threshold": 0.8,
             "tile": 16, "at_once": 1},
        ),
    ],
    ids=["defaults", "every option"],
)  # fmt: skip
def test_python_and_the_command_make_the_same_pixels(run, cascade, tmp_path, flags, options):
    done = CliRunner().invoke(
        main, ["sample", "red heart", "sun", "--run", str(run), "--out", str(tmp_path), *flags]
    )
    assert done.exit_code == 0, done.output
    files = sorted(path for path in tmp_path.glob("*.png") if not path.name.startswith("grid"))
    stream = list(cascade.stream(["red heart", "sun"], **options))
    pictures = cascade.sample(["red heart", "sun"], **options)
    assert len(pictures) == len(files) == len(stream) == 2 * options.get("num", 1)
    for file, picture, one in zip(files, pictures, stream, strict=True):
        facts = json.loads(file.with_suffix(".json").read_text())
        assert (one.prompt, one.seed) == (facts["prompt"], facts["seed"])
        assert one.runtimes == [stage["runtime"] for stage in facts["stages"]]
        with Image.open(file) as written:
            np.testing.assert_array_equal(np.asarray(written), np.asarray(picture))
        np.testing.assert_array_equal(np.asarray(one.image), np.asarray(picture))


def test_pictures_are_rgb_and_of_the_stages_sizes(run, cascade):
    assert cascade.image_sizes == [16, 32]
    (one,) = cascade.stream("sun", steps=1)
    assert isinstance(one, Sample)
    assert [(stage.mode, stage.size) for stage in one.stages] == [("RGB", (16, 16)),
                                                                  ("RGB", (32, 32))]  # fmt: skip
    base = Cascade.load(run, unet_limit=1, device="cpu")
    assert base.image_sizes == [16]
    (picture,) = base.sample("sun", steps=1)
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(one.stages[0]))


def test_the_caller_is_told_of_steps_and_of_the_runtime(run):
    said, steps = [], []
    cascade = Cascade.load(run, say=said.append)
    cascade.sample("sun", steps=[2, 1], on_step=lambda *step: steps.append(step))
    assert steps == [(1, 1, 2), (1, 2, 2), (2, 1, 1)]
    assert [sentence[:8] for sentence in said] == ["U-Net 1:", "U-Net 2:"]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: there is none"),
        (["sun", 3], {}, "prompts[1]: 3 is not a string"),
        ("sun", {"seed": -1}, "seed -1: it should be greater than or equal to 0"),
        ("sun", {"num": 0}, "num 0: it should be greater than or equal to 1"),
        ("sun", {"tile": 1.5}, "tile 1.5: it should be a valid integer"),
        ("sun", {"at_once": 0}, "at_once 0: it should"),
        ("sun", {"sampler": "euler"}, "sampler 'euler': it should be 'ddpm', 'ddim'"),
        ("sun", {"spacing": ["karras", "even"]}, "spacing 'even': it should be 'auto'"),
        ("sun", {"steps": [1, 2, 3]}, "steps: 3 values for 2 stage"),
        ("sun", {"cond_scale": float("inf")}, "cond_scale inf: it should be a finite number"),
    ],
)
def test_wrong_options_are_refused_before_any_work(cascade, prompts, options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        cascade.stream(prompts, **options)  # not even the first picture is asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "onyx"}, "runtime 'onyx': it should be 'auto', 'torch'"),
        ({"precision": "fp64"}, "precision 'fp64': it should be 'fp16'"),
        ({"device": "gpu"}, "device: 'gpu' is none that torch knows"),
        ({"device": "cuda:99"}, "device: 'cuda:99', but torch sees"),
        ({"unet_limit": 3}, "unet_limit 3: this cascade has U-Nets 1 to 2"),
    ],
)
def test_a_run_is_not_opened_with_wrong_options(run, options, message):
    with pytest.raises(ImagenScaleError, match=re.escape(message)):
        Cascade.load(run, **options)


def test_the_newest_run_is_opened_where_none_is_named(run, monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="nowhere: not a run folder"):
        Cascade.load("nowhere")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(run.parent)
    assert Cascade.load().image_sizes == [16, 32]


@pytest.mark.parametrize("document", ["README.md", "docs/api.md"])
def test_the_examples_run_as_they_are_written(run, document, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "emoji_demo").symlink_to(run)
    blocks = [block[2] for block in BLOCK.finditer((ROOT / document).read_text(encoding="utf-8"))
              if block[1] == "python"]  # fmt: skip
    assert blocks
    for block in blocks:
        exec(block, {})
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".png"}


def test_importing_the_package_is_light_and_shows_every_name():
    code = (
        "import sys, imagen_scale; assert set(imagen_scale.__all__) <= set(dir(imagen_scale));"
        "assert not {'torch', 'numpy', 'PIL', 'pydantic'} & set(sys.modules), 'heavy';"
        "from imagen_scale import Cascade, Sample; assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'Cascada'"):
        _ = imagen_scale.Cascada


def test_the_page_lists_every_public_name_with_its_signature():
    """To write it anew: python tests/refresh_docs.py."""
    for name in ("sampling.md", "api.md"):
        page = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert api_reference.refreshed(page) == page
    for name in (*imagen_scale.__all__, "Cascade.load", "Cascade.sample", "UsageError"):
        assert f"`{name}" in page
