"""One training at a time in a run's folder."""

import json
import multiprocessing
import os
import threading
import time

import pytest

from imagen_scale.errors import UsageError
from imagen_scale.runs.folders import owner_path
from imagen_scale.training import owner as module
from imagen_scale.training.owner import Owner, check_owner


@pytest.fixture
def quick(monkeypatch):
    """Seconds instead of minutes."""
    monkeypatch.setattr(module, "STALE_S", 2.5)
    monkeypatch.setattr(module, "TOUCH_S", 0.1)


def elsewhere(run, **changes):
    """An owner as another machine sees it."""
    facts = {"host": "worker-2", "machine": "another boot 1", "pid": 1, "started": "5"} | changes
    run.mkdir(exist_ok=True)
    owner_path(run, 1).write_text(json.dumps(facts))


def test_a_second_training_is_refused_by_name_until_the_first_has_left(tmp_path):
    run = tmp_path / "run"
    first, second = Owner(run, [1, 2]), Owner(run, [2])
    first.take()
    for refuse in (second.take, lambda: check_owner(run, [2])):
        with pytest.raises(UsageError, match=rf"unet2 is .* process {os.getpid()} on .*--run"):
            refuse()
    Owner(run, [3]).take()  # stages are independent
    first.release()
    second.take()
    assert owner_path(run, 2).is_file() and not owner_path(run, 1).exists()


def test_nothing_is_taken_where_one_is_in_use(tmp_path):
    held = Owner(tmp_path, [2])
    held.take()
    with pytest.raises(UsageError):
        Owner(tmp_path, [1, 2]).take()
    assert not owner_path(tmp_path, 1).exists()
    assert owner_path(tmp_path, 2).is_file()


def _take_and_die(run):
    Owner(run, [1]).take()
    os._exit(9)


def test_an_owner_that_was_killed_is_no_owner(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=_take_and_die, args=(tmp_path,))
    child.start()
    child.join()
    assert owner_path(tmp_path, 1).is_file()
    check_owner(tmp_path, [1])
    Owner(tmp_path, [1]).take()


def test_an_owner_on_another_machine_lives_while_it_touches_its_file(tmp_path, quick, capsys):
    elsewhere(tmp_path)
    touches = threading.Thread(target=_touch_for, args=(owner_path(tmp_path, 1), 1.5))
    touches.start()
    with pytest.raises(UsageError, match="process 1 on worker-2"):
        Owner(tmp_path, [1]).take()
    touches.join()
    taken = Owner(tmp_path, [1])
    taken.take()  # silent by now
    assert "is process 1 on worker-2's: looking for signs of life" in capsys.readouterr().out
    assert json.loads(owner_path(tmp_path, 1).read_text())["pid"] == os.getpid()


def _touch_for(path, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        os.utime(path)
        time.sleep(0.05)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": 3}'])
def test_a_damaged_file_is_in_nobodys_way_for_long(text, tmp_path, quick):
    owner_path(tmp_path, 1).write_text(text)
    Owner(tmp_path, [1]).take()


def test_it_touches_its_file(tmp_path, quick):
    held = Owner(tmp_path, [1])
    held.take()
    before = owner_path(tmp_path, 1).stat().st_mtime_ns
    time.sleep(0.5)
    assert owner_path(tmp_path, 1).stat().st_mtime_ns > before
    held.release()
    assert not owner_path(tmp_path, 1).exists()
