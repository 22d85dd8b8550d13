"""A disk that fills up while pictures are written: it is named, and so is what is there."""

import json
import re
import resource
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from imagen_scale.commands.main import main
from imagen_scale.errors import of_system
from imagen_scale.files.atomic import write_atomically
from imagen_scale.files.picture_files import save_sample
from imagen_scale.sampling.folder import SampleFolder

FACTS_FIT = 1800  # bytes: the facts of a tiny picture do, its PNG file does not


@contextmanager
def largest_file(size):
    """No file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_picture_is_there_with_its_facts_or_not_at_all(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with largest_file(5000), pytest.raises(OSError) as caught:
        save_sample(tmp_path, 1, noise, {"prompt": "sun"})
    assert re.fullmatch(rf"{tmp_path}/00001_\w{{8}}\.png: File too large", of_system(caught.value))
    assert not list(tmp_path.iterdir())


def test_the_error_of_a_full_disk_names_the_file(tmp_path):
    with largest_file(10), pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "x", lambda path: path.write_bytes(bytes(100)))
    assert of_system(caught.value) == f"{tmp_path / 'x'}: File too large"
    assert of_system(OSError(28, "No space left on device")) == "No space left on device"


@pytest.mark.parametrize(
    ("words", "file"),
    [(["--json"], "evaluation.json"), (["--steps-table", "1", "--json"], "steps_table.json")],
)
def test_what_was_measured_is_shown_though_it_cannot_be_kept(run, tmp_path, words, file):
    folder = shutil.copytree(run, tmp_path / "run")
    common = ["evaluate", "--run", folder, "--num", 2, "--unet-limit", 1]
    common += [] if "--steps-table" in words else ["--steps", 1]
    assert cli(*common, *words).exit_code == 0  # everything else is prepared by now
    (folder / file).unlink()
    with largest_file(100):
        done = cli(*common, *words)
    assert done.exit_code == 1 and json.loads(done.stdout)
    assert re.search(
        rf"^error: {folder / file}: File too large\. What was measured stands above",
        done.stderr, re.MULTILINE,
    ), done.stderr  # fmt: skip
    assert not (folder / file).exists()


@pytest.mark.parametrize(("full_after", "grid"), [(0, False), (1, False), (3, True)])
def test_sampling_says_how_many_pictures_there_are(run, tmp_path, monkeypatch, full_after, grid):
    write = SampleFolder.write

    def fill(made):
        if made.written == full_after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (FACTS_FIT, limits[1]))

    def write_and_fill(made, picture):
        fill(made)
        path = write(made, picture)
        fill(made)
        return path

    monkeypatch.setattr(SampleFolder, "write", write_and_fill)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        done = cli("sample", "sun", "key", "pizza", "--run", run, "--out", tmp_path, "--steps", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.exit_code == 1
    name = r"grid_00001\.png" if grid else rf"0000{full_after + 1}_\w{{8}}\.png"
    assert re.search(
        rf"^error: {tmp_path}/{name}: File too large\. {full_after} of 3 pictures are in "
        rf"{tmp_path}; make room there, or name another folder with --out\.$",
        done.stderr, re.MULTILINE,
    ), done.stderr  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 2 * full_after
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            image.load()


def test_enlarging_leaves_nothing_half_written(run, tmp_path):
    Image.effect_noise((16, 16), 90).convert("RGB").save(tmp_path / "in.png")
    with largest_file(FACTS_FIT):
        done = cli("upscale", tmp_path / "in.png", "--run", run, "--steps", 1)
    assert done.exit_code == 1
    assert f"error: {tmp_path}/in_x2.png: File too large" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]
