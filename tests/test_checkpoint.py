"""Checkpoints on disk: whole or not there, verified, and pruned without losing a good one."""

import os
import platform
import subprocess
import sys

import pytest

from imagen_scale.errors import CheckpointError, DiskProblem
from imagen_scale.files.atomic import clear_temporary, temporary_path, write_atomically
from imagen_scale.runs.checkpoint import (
    commit,
    list_checkpoints,
    newest_good,
    remove_old,
    staging_folder,
    verify_checkpoint,
)


def save(parent, step):
    staging = staging_folder(parent, step)
    (staging / "deepspeed").mkdir()
    (staging / "deepspeed" / "shard.pt").write_bytes(bytes(range(256)) * step)
    (staging / "ema.safetensors").write_bytes(b"ema" * step)
    return commit(staging, step, {"processes": 1})


def names(parent):
    return [path.name for path in list_checkpoints(parent)]


def test_a_commit_is_whole(tmp_path):
    folder = save(tmp_path, 5)
    manifest = verify_checkpoint(folder)
    assert manifest["step"] == 5
    assert manifest["processes"] == 1
    assert set(manifest["files"]) == {"deepspeed/shard.pt", "ema.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


def test_an_unfinished_save_is_no_checkpoint_and_is_cleared_by_the_next(tmp_path):
    staging = staging_folder(tmp_path, 3)
    (staging / "half").touch()
    left = temporary_path(tmp_path / "inference.safetensors").name  # of a killed write_atomically
    (tmp_path / left.replace(f"-{os.getpid()}.", "-4194305.")).touch()  # there is no such number
    assert names(tmp_path) == []
    save(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "delete", "manifest", "no manifest"])
@pytest.mark.parametrize("name", ["deepspeed/shard.pt", "ema.safetensors"])
def test_any_damage_is_found_and_the_one_before_is_used(tmp_path, damage, name):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    file = folder / ("manifest.json" if "manifest" in damage else name)
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 3] ^= 4
    if damage in ("flip", "cut", "manifest"):
        file.write_bytes(content[: len(content) // (1 if damage == "flip" else 2)])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    told = []
    found, manifest = newest_good(tmp_path, told.append)
    assert found.name == "step_00000001"
    assert manifest["step"] == 1
    assert len(told) == 1
    assert str(file) in told[0]


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", '{"step": 2}', '{"step": 2, "files": {}}', '{"step": 2, "files": {"a": 1}}',
     '{"step": 2, "files": [1]}', "[" * 100_000, '{"step": 3, "files": {"a": {}}}'],
)  # fmt: skip
def test_a_manifest_that_is_none_is_damage(tmp_path, text):
    (save(tmp_path, 2) / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: (missing or damaged|not that of)"):
        verify_checkpoint(tmp_path / "step_00000002")


def test_a_checkpoint_under_another_steps_name_is_damaged(tmp_path):
    folder = save(tmp_path, 2)
    renamed = folder.rename(tmp_path / "step_00000009")
    with pytest.raises(CheckpointError, match="not that of this checkpoint"):
        verify_checkpoint(renamed)


def test_all_damaged_is_an_error_and_none_at_all_is_a_start(tmp_path):
    assert newest_good(tmp_path / "none", print) == (None, None)
    folder = save(tmp_path, 1)
    (folder / "ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints are damaged.*--fresh"):
        newest_good(tmp_path, lambda _: None)


def test_pruning_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
        remove_old(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_00000003", "step_00000002"]


def test_pruning_removes_a_passed_over_future_before_a_good_past(tmp_path):
    for step in (500, 1000):
        save(tmp_path, step)
    (tmp_path / "step_00001000" / "ema.safetensors").unlink()
    save(tmp_path, 600)
    remove_old(tmp_path, 600, keep=1)
    assert names(tmp_path) == ["step_00000600"]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000600"]


def test_pruning_does_not_count_what_was_passed_over(tmp_path):
    """Fallen back from 9 to 6 and saved at 12: 9 is no checkpoint to keep in place of 6."""
    for step in (6, 9, 12):
        save(tmp_path, step)
    remove_old(tmp_path, 12, keep=2, good=6)
    assert names(tmp_path) == ["step_00000012", "step_00000006"]


def test_a_file_of_a_checkpoints_name_is_nobodys_checkpoint(tmp_path):
    file, told = tmp_path / "step_00000009", []
    file.write_text("hi")
    assert newest_good(tmp_path, told.append) == (None, None)
    for step in (3, 6):
        save(tmp_path, step)
        remove_old(tmp_path, step, keep=1, good=3)
    assert newest_good(tmp_path, told.append)[0].name == "step_00000006"
    with pytest.raises(DiskProblem, match=r"step_00000009: stands where .* is no folder\. Move it"):
        save(tmp_path, 9)
    assert file.read_text() == "hi" and not told
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000006", "step_00000009"}


def test_a_checkpoint_that_lies_elsewhere_is_read_there_and_its_link_removed(tmp_path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    save(run, 1).rename(disk)
    (run / "step_00000001").symlink_to(disk)
    assert newest_good(run, print)[1]["step"] == 1
    save(run, 2)
    remove_old(run, 2, keep=1)
    assert [path.name for path in run.iterdir()] == ["step_00000002"]
    assert (disk / "manifest.json").is_file()


def test_the_same_step_may_be_saved_again(tmp_path):
    save(tmp_path, 2)
    folder = save(tmp_path, 2)
    assert verify_checkpoint(folder)["step"] == 2


def test_a_failed_write_leaves_the_file_before_and_no_debris(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoints_at_multiples_are_kept_for_good(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step)
        remove_old(tmp_path, step, keep=2, every=3)
    assert names(tmp_path) == ["step_00000007", "step_00000006", "step_00000003"]
    assert not list(tmp_path.glob(".staging*"))


def test_what_others_are_writing_is_not_cleared_away(tmp_path, monkeypatch):
    """A folder that several machines share, as ~/.cache often is."""
    file = tmp_path / "pictures.npy"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = temporary_path(file)
    alive = own.with_name(own.name.replace(f"-{os.getpid()}.", f"-{child.pid}."))
    monkeypatch.setattr(platform, "node", lambda: "worker-2.cluster")
    elsewhere, old = temporary_path(file), temporary_path(tmp_path / "pictures.npy.of.yore")
    monkeypatch.undo()
    assert len({own.name, alive.name, elsewhere.name}) == 3
    for path in (own, alive, elsewhere, old):
        path.touch()
    os.utime(old, (0, 0))
    clear_temporary(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, elsewhere.name}
    child.communicate(b"\n")
    clear_temporary(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [elsewhere.name]
