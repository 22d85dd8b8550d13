"""Where commands write, and options that a shell left empty: refused before any work."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from support.tiny import TINY

from imagen_scale.commands import train_process
from imagen_scale.commands.main import main
from imagen_scale.errors import CheckpointError, UsageError
from imagen_scale.files.picture_files import save_new_picture
from imagen_scale.runs.inference import read_stages


def cli(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "sun", "--out", "FILE"),
        ("sample", "sun", "--out", "FILE/deeper"),
        ("sheet", "sun", "--out", "FILE/a.png"),
        ("upscale", "PICTURE", "--out", "FILE/a.png"),
        ("report", "RUN", "--out", "FILE/a.html"),
        ("export", "--bundle", "--out", "FILE/x"),
        ("export", "triton", "FOLDER", "--out", "FILE/x"),
        ("plan", "--config", "CONFIG", "--write", "FILE"),
        ("train", "CONFIG", "--run", "FILE/x", "--dry-run"),
    ],
)
def test_a_place_in_a_file_is_refused(words, run, tmp_path):
    file, picture = tmp_path / "file.txt", tmp_path / "picture.png"
    file.write_text("a file")
    Image.new("RGB", (16, 16)).save(picture)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    known = {"CONFIG": config, "FILE": file, "PICTURE": picture, "RUN": run, "FOLDER": tmp_path}
    words = [
        str(known.get(word.partition("/")[0], word)) + "".join(word.partition("/")[1:])
        for word in words
    ]
    takes_run = words[0] in ("sample", "sheet", "upscale") or words[1] == "--bundle"
    done = cli(*words, *(("--run", run) if takes_run else ()))
    assert done.exit_code == 2, done.output
    assert f"{file} is a file, and nothing can be written into it" in done.output
    assert file.read_text() == "a file"


def test_a_picture_in_a_file_is_no_name_that_is_taken(tmp_path):
    """Whoever writes it: more names were tried for ever."""
    (tmp_path / "file.txt").write_text("a file")
    with pytest.raises(OSError, match="exists|Not a directory"):
        save_new_picture(tmp_path / "file.txt" / "a.png", None, {})


@pytest.mark.parametrize(
    "words",
    [
        ("train", "config.json", "--run", "", "--fresh"),
        ("train", "config.json", "--run=", "--fresh"),
        ("sample", "sun", "--shard", ""),
        ("sample", "--from-file", "", "sun"),
        ("sample", "sun", "--out", ""),
        ("export", "--bundle", "--out", ""),
        ("plan", "--config", ""),
        ("distill", "first", "--to", "", "--steps", "4"),
    ],
)
def test_an_option_that_a_shell_left_empty_is_refused(words):
    name = next(word for word in words if word.startswith("--") and word != "--bundle")
    done = cli(*words)
    assert done.exit_code == 2 and f"{name.rstrip('=')}: is empty" in done.output, done.output


def test_a_launcher_that_hands_on_an_empty_option_is_told_too(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "config.json", "--run", ""])
    with pytest.raises(UsageError, match="--run: is empty, as an unset variable of a shell is"):
        train_process._run(None)


def test_texts_may_be_empty(run, tmp_path):
    done = cli("sample", "", "--negative-prompt", "", "--run", run, "--steps", 1, "--out", tmp_path)
    assert done.exit_code == 0, done.output


def test_a_run_in_a_folder_whose_name_is_no_text_is_not_called_damaged(run, tmp_path, monkeypatch):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    shutil.copytree(run, folder)
    with pytest.raises(CheckpointError, match="names are UTF-8 text; rename the folder"):
        read_stages(Path(folder), allow_unfinished=False)
    monkeypatch.chdir(folder)  # what lies above does not matter
    assert len(read_stages(Path(), allow_unfinished=False)) == 2
