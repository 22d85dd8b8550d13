"""One training at a time in a run's folder."""

import errno
import json
import multiprocessing
import os
import threading
import time

import pytest

from imagen_scale.errors import UsageError
from imagen_scale.runs.folders import owner_path
from imagen_scale.training import owner as module
from imagen_scale.training.beats import pid_namespace
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


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"machine": 3}', b"\xff\xfe"])
def test_a_damaged_file_is_in_nobodys_way_for_long(text, tmp_path, quick):
    owner_path(tmp_path, 1).write_bytes(text)
    Owner(tmp_path, [1]).take()


def take_together(run, *, apart=0.0):
    """What became of two that start together, or so many seconds apart."""
    owners, found, together = [Owner(run, [1]) for _ in range(2)], [], threading.Barrier(2)

    def take(owner, wait):
        together.wait()
        time.sleep(wait)
        try:
            owner.take()
            found.append("took it")
        except UsageError as refused:
            found.append(str(refused))

    threads = [threading.Thread(target=take, args=(owners[i], i * apart)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    facts = json.loads(owner_path(run, 1).read_text())
    for owner in owners:
        owner.release()
    assert facts["pid"] == os.getpid()
    assert not list(run.iterdir())
    return sorted(found, key=len)


def test_of_two_that_wait_for_a_dead_owner_elsewhere_one_takes_over(tmp_path, quick):
    elsewhere(tmp_path / "run")
    taken, refused = take_together(tmp_path / "run", apart=0.7)
    assert taken == "took it"
    assert f"unet1 is being trained there by process {os.getpid()} on" in refused


def test_of_two_that_find_a_dead_owner_at_once_one_takes_over(tmp_path):
    """So often that they meet between any two lines."""
    for _ in range(100):
        elsewhere(tmp_path / "run", machine=pid_namespace(), pid=2**22 + 1)  # there is no such
        taken, refused = take_together(tmp_path / "run")
        assert taken == "took it" and "unet1 is being trained there by" in refused


def test_a_file_system_without_links_will_do(tmp_path, monkeypatch):
    def link(source, target):  # on exFAT
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(source))

    monkeypatch.setattr(os, "link", link)
    elsewhere(tmp_path / "run", machine=pid_namespace(), pid=2**22 + 1)
    first = Owner(tmp_path / "run", [1])
    first.take()
    with pytest.raises(UsageError, match=f"by process {os.getpid()} on"):
        Owner(tmp_path / "run", [1]).take()
    assert list((tmp_path / "run").iterdir()) == [owner_path(tmp_path / "run", 1)]
    first.release()
    assert not list((tmp_path / "run").iterdir())


def test_a_file_that_is_being_written_is_nobody_elses_to_take(tmp_path, quick):
    """Empty at first, as file systems without links show it."""
    path = owner_path(tmp_path, 1)
    path.write_text("")
    Owner(tmp_path / "other", [1]).take()
    words = owner_path(tmp_path / "other", 1).read_text()
    timer = threading.Timer(0.5, path.write_text, [words])
    timer.start()
    with pytest.raises(UsageError, match=f"by process {os.getpid()} on"):
        Owner(tmp_path, [1]).take()
    assert path.read_text() == words


def test_a_file_that_was_renewed_before_it_is_removed_stays(tmp_path, monkeypatch):
    path = owner_path(tmp_path, 1)
    path.write_text("new")
    module._remove(path, "stale")
    monkeypatch.setattr(module, "_read", lambda _: "stale")  # as it was a moment ago
    module._remove(path, "stale")
    assert [(file, file.read_text()) for file in tmp_path.iterdir()] == [(path, "new")]


def test_it_touches_its_file(tmp_path, quick):
    held = Owner(tmp_path, [1])
    held.take()
    before = owner_path(tmp_path, 1).stat().st_mtime_ns
    time.sleep(0.5)
    assert owner_path(tmp_path, 1).stat().st_mtime_ns > before
    held.release()
    assert not owner_path(tmp_path, 1).exists()
