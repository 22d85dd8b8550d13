"""Two programs in one folder: pictures, exports and the record of engines."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from click.testing import CliRunner
from imagen_scale_export.staging import staged
from PIL import Image

from imagen_scale.commands.main import main
from imagen_scale.errors import UsageError
from imagen_scale.files.locks import locked
from imagen_scale.files.numbers import next_number, taken_number
from imagen_scale.files.picture_files import save_new_picture, save_png, save_sample
from imagen_scale.sampling.folder import SampleFolder
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes import built_here
from imagen_scale.sampling.runtimes.manifest import EngineFacts
from imagen_scale.sampling.stages import TrainedStages
from imagen_scale.sampling.upscale import Upscaler

DOT = np.zeros((1, 1, 3), np.uint8)


def numbers_in(folder):
    return sorted(int(path.name[:5]) for path in folder.glob("0*.png"))


def test_a_number_that_is_held_is_nobody_elses(tmp_path):
    with taken_number(tmp_path) as one, taken_number(tmp_path) as other:
        assert (one, other) == (1, 2)
        save_sample(tmp_path, other, DOT, {})
    with taken_number(tmp_path) as third:
        assert third == 3
    assert numbers_in(tmp_path) == [2] and len(list(tmp_path.iterdir())) == 2


def test_a_number_is_free_again_where_nothing_was_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), taken_number(tmp_path):
        raise KeyboardInterrupt
    with taken_number(tmp_path) as number:
        assert number == 1


def test_a_grid_keeps_its_number_when_pictures_are_deleted(tmp_path):
    (tmp_path / "grid_00004.png").touch()
    assert next_number(tmp_path) == 5


def test_many_at_once_never_share_a_number(tmp_path):
    def write(writer):
        for i in range(15):
            with taken_number(tmp_path) as number:
                save_sample(tmp_path, number, DOT, {"writer": writer, "i": i})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    found = numbers_in(tmp_path)
    assert len(found) == len(set(found)) == 120


def test_many_at_once_never_overwrite_a_file_of_one_name(tmp_path):
    (tmp_path / "x_3.json").write_text("somebody's")

    def write(writer):
        return save_new_picture(tmp_path / "x.png", DOT, {"writer": writer})

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(write, range(24)))
    assert len(set(paths)) == 24 and tmp_path / "x.png" in paths
    assert tmp_path / "x_3.png" not in paths
    assert (tmp_path / "x_3.json").read_text() == "somebody's"
    for writer, path in enumerate(paths):
        assert json.loads(path.with_suffix(".json").read_text()) == {"writer": writer}


def test_two_upscalings_into_one_file_leave_two(run, tmp_path, monkeypatch):
    save_png(tmp_path / "small.png", np.full((16, 16, 3), 80, np.uint8))
    call = Upscaler.__call__

    def overtaken(*arguments):
        made = call(*arguments)
        save_png(tmp_path / "out.png", DOT)  # another's, which took less time
        return made

    monkeypatch.setattr(Upscaler, "__call__", overtaken)
    words = ["upscale", tmp_path / "small.png", "--run", run, "--steps", 1]
    done = CliRunner().invoke(main, [str(one) for one in [*words, "--out", tmp_path / "out.png"]])
    assert done.exit_code == 0, done.output
    assert "was written by another call meanwhile" in done.stderr
    assert f"32 x 32 px: {tmp_path / 'out_2.png'}" in done.stdout
    for name, size in (("out", 1), ("out_2", 32)):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (size, size)


def test_two_calls_in_one_folder_have_two_grids(run, tmp_path):
    """Both begin before either has written anything, and take turns."""
    cascade = TrainedStages.load(run, unet_limit=1)
    options = SamplingOptions(steps=1)
    pictures = list(cascade.stream(["sun", "key", "pizza"], options))
    calls = [SampleFolder(tmp_path, cascade, options) for _ in range(2)]
    for picture in pictures:
        for call in calls:
            call.write(picture)
    assert [call.written for call in calls] == [3, 3]
    assert numbers_in(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [call.grid.name for call in calls] == ["grid_00001.png", "grid_00002.png"]


def test_who_waits_says_for_whom(tmp_path):
    has_lock, has_said = threading.Event(), threading.Event()
    said = []

    def say(sentence):
        said.append(sentence)
        has_said.set()

    def hold():
        with staged(tmp_path / "onnx-fp32", force=False, tell=lambda sentence: None):
            has_lock.set()
            assert has_said.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert has_lock.wait(60)
    with (
        pytest.raises(UsageError, match="exists already"),
        staged(tmp_path / "onnx-fp32", force=False, tell=say),
    ):
        pass
    thread.join()
    (sentence,) = said
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path))}: waiting for process \d+ on \S+, which works there", sentence
    )
    with locked(tmp_path / ".lock", said.append):  # nobody is there any more
        assert len(said) == 1


def test_no_engine_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEN_SCALE_CACHE", str(tmp_path))
    facts = EngineFacts(library="tensorrt_rtx", version="1", targets=("a",), onnx_sha256="0")

    def build(builder):
        for i in range(10):
            built_here.remember(facts, "denoiser.engine", f"{builder}-{i}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(build, range(6)))
    for builder in range(6):
        for i in range(10):
            assert built_here.is_built_here(facts, "denoiser.engine", f"{builder}-{i}")
