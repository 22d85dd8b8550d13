"""Ranks that die, stop, hang or fail: the others say which one, and stop."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from support import store_lost, watched
from support.environment import rank_variables, reserved_port
from support.forker import fork
from support.tiny import TINY
from torch.distributed import HashStore

from imagen_scale.training import beats, circle
from imagen_scale.training.beats import Beat, Seen, faults
from imagen_scale.training.circle import this_process
from imagen_scale.training.watchdog import Watchdog

LIMIT = 120.0
OWN = Beat(0, phase="step", step=7, progress=20)


def judge(*others, own=OWN, now=1000.0, gone=(), **changed):
    """The sentences about ranks seen as (beat, seconds since it beat, seconds since it moved)."""
    known = {
        "awake_since": 0.0, "answered": now, "is_store_lost": False, "timeout": LIMIT,
        "is_gone": lambda beat: beat.rank in gone,
    }  # fmt: skip
    seen = [Seen(beat, now - beaten, now - moved) for beat, beaten, moved in others]
    return faults(own, seen, now=now, **known | changed)


def peer(number=1, **changed):
    values = {"host": "b", "pid": 9, "phase": "step", "step": 7, "progress": 20} | changed
    return Beat(number, **values)


def test_ranks_that_keep_pace_are_left_alone():
    assert judge((peer(), 1, 1), (peer(2), 2, 100)) == {}


@pytest.mark.parametrize(
    ("silence", "timeout", "is_found"),
    [(112, LIMIT, False), (113, LIMIT, True), (9e9, None, False)],
)
def test_silence_is_judged_by_the_limit(silence, timeout, is_found):
    found = judge((peer(), silence, silence), now=1e10, timeout=timeout)
    assert bool(found) == is_found
    if is_found:
        assert found[1] == (
            "rank 1 (host b, process 9) has given no sign of life for 113 s; it was in phase "
            "'step' after step 7. Its process was stopped, or its machine stands still or is out "
            "of reach (training.hang_timeout is 120 s)."
        )


def test_a_process_that_is_gone_is_found_at_once_and_without_a_limit():
    found = judge((peer(phase="saving"), 0, 0), gone={1}, timeout=None)
    assert "rank 1 (host b, process 9) is gone: killed or crashed in phase 'saving'" in found[1]


def test_one_that_finished_is_not_missed():
    assert judge((peer(state="done"), 9e9, 9e9), gone={1}, now=1e10) == {}


def test_what_failed_gives_its_reason():
    found = judge((peer(state="failed", reason="no space left."), 0, 0))
    assert found == {1: "rank 1 (host b, process 9) failed in phase 'step' after step 7: no space "
                        "left."}  # fmt: skip


def test_the_judgement_of_a_rank_that_left_counts_where_there_is_none_of_our_own():
    left = peer(2, state="left", reason="rank 1 hangs")
    assert judge((peer(), 0, 0), (left, 0, 0)) == {2: "rank 1 hangs"}
    assert set(judge((peer(), 0, 0), (left, 0, 0), gone={1})) == {1}


@pytest.mark.parametrize(
    ("phase", "progress", "stood", "is_found"),
    [
        ("loading data", 19, 113, True),
        ("step", 19, 113, True),
        ("saving", 19, 113, True),
        ("loading data", 19, 112, False),
        ("loading data", 20, 9e9, False),  # nobody is ahead: a slow step of all
        ("saving", 20, 9e9, False),
        ("preparing", 0, 9e9, False),
        ("drawing pictures", 19, 9e9, False),
        ("building", 0, 9e9, False),
        ("first step", 1, 9e9, False),
    ],
)
def test_a_rank_hangs_if_it_stands_still_where_all_keep_pace(phase, progress, stood, is_found):
    beat = peer(phase=phase, progress=progress)
    found = judge((beat, 0, stood), now=1e10)
    assert bool(found) == is_found
    if is_found:
        assert f"rank 1 (host b, process 9) hangs: it has been in phase {phase!r}" in found[1]
    # The same seen by the one that is behind: it blames nobody.
    assert judge((peer(0), 0, stood), own=beat, now=1e10) == {}


def test_a_rank_that_an_exception_ends_has_a_minute_more_to_say_so():
    beat = peer(state="leaving", phase="step", progress=19)
    assert judge((beat, 0, 113)) == judge((beat, 0, 172)) == {}
    assert set(judge((beat, 0, 173))) == {1}
    assert set(judge((beat, 0, 0), gone={1})) == {1}


def test_a_process_that_was_asleep_judges_from_its_awakening():
    assert judge((peer(), 900, 900), awake_since=990.0) == {}
    assert set(judge((peer(), 900, 900), awake_since=880.0)) == {1}


def test_when_the_store_is_silent_only_its_keeper_is_to_blame():
    own, keeper, other = peer(1), peer(0), peer(2)
    silent = judge((keeper, 130, 130), (other, 130, 130), own=own, answered=870.0)
    assert set(silent) == {0}
    assert set(judge((keeper, 1, 1), (other, 1, 1), own=own, is_store_lost=True)) == {0}
    finished = peer(0, state="done")
    assert judge((finished, 1, 1), (other, 1, 1), own=own, is_store_lost=True) == {}


def test_progress_and_beats_are_timed_apart():
    seen = Seen(peer(), 1.0, 1.0)
    seen = seen.renewed(seen.beat._replace(number=1), 2.0)
    assert (seen.beaten, seen.moved) == (2.0, 1.0)
    seen = seen.renewed(seen.beat._replace(number=2, progress=21), 3.0)
    assert (seen.beaten, seen.moved) == (3.0, 3.0)
    assert seen.renewed(seen.beat, 4.0) == seen
    seen = seen.renewed(seen.beat._replace(activity=1), 5.0)  # a slow disk
    assert (seen.beaten, seen.moved) == (3.0, 5.0)
    assert Beat.from_json(seen.beat.to_json()) == seen.beat


def test_all_stop_within_the_limit():
    for timeout in (14.0, 20.0, 120.0):
        assert beats.judged_after(timeout) + beats.GRACE_S + 2 * beats.BEAT_S == timeout
    assert beats.judged_after(5.0) == 2.5  # a beat may be late


def test_writing_and_reading_are_seen_and_waiting_is_not(tmp_path):
    def activity():
        return beats.io_bytes(threading.get_native_id())

    activity()
    before, file = activity(), tmp_path / "file"
    idle = activity() - before  # what looking itself reads
    file.write_bytes(b"x" * 100_000)
    written = activity()
    assert written - before >= 100_000 + idle
    file.read_bytes()
    assert activity() - written >= 100_000
    helper = threading.Thread(target=file.read_bytes)
    before = activity()
    helper.start()
    helper.join()
    assert activity() - before < 100_000


def test_a_process_is_told_from_another_with_its_number_and_from_a_zombie():
    own = beats.started(os.getpid())
    assert own and own == beats.started(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert beats.started(child.pid) == ""  # ended, not yet waited for
    child.wait()
    assert beats.started(child.pid) == ""
    assert beats.started(1) != own
    assert beats.pid_namespace() == beats.pid_namespace()


def test_phases_nest_and_an_exception_leaves_the_phase_it_came_from():
    watchdog = Watchdog(LIMIT)
    with watchdog.phase("step"):
        loaded = list(watchdog.loading(iter("ab")))
        with watchdog.phase("saving"):
            assert watchdog._phase == "saving"
        assert watchdog._phase == "step"
    watchdog.stepped(1)
    assert (loaded, watchdog._progress, watchdog._step) == (["a", "b"], 3, 1)
    with pytest.raises(ZeroDivisionError), watchdog.phase("step"), watchdog.phase("saving"):
        raise ZeroDivisionError
    assert (watchdog._phase, watchdog._is_leaving) == ("saving", True)
    with watchdog.phase("building"):
        assert not watchdog._is_leaving


class SlowStore:
    """Takes a while for every word."""

    def __init__(self, delay):
        self.delay, self.store = delay, HashStore()

    def __getattr__(self, name):
        time.sleep(self.delay)
        return getattr(self.store, name)


@pytest.mark.parametrize(
    ("delay", "stopped", "is_given_up"), [(0.2, 0, False), (0.2, 2, False), (3.0, 0, True)]
)
def test_a_store_is_given_up_when_it_is_silent_not_when_it_is_slow(
    delay, stopped, is_given_up, monkeypatch
):
    """Else a rank on a machine that is busy or stood still says what another one is about to."""
    monkeypatch.setattr(circle, "BEAT_S", 0.05)
    left = this_process()._replace(state="failed")
    may_speak = time.monotonic() + stopped + 1.5
    slow = circle.Circle(HashStore(), lambda: left, lambda: time.monotonic() > may_speak)
    slow._store = SlowStore(delay)
    slow.start()
    own = os.getpid()
    stall = f"sleep 0.3; kill -STOP {own}; sleep {stopped}; kill -CONT {own}" if stopped else ":"
    with subprocess.Popen(["sh", "-c", stall], start_new_session=True):
        slow.leave(patience=0.8, limit=10.0)
    assert slow._thread.is_alive() == is_given_up


def test_a_reason_may_name_a_file_whose_name_is_not_text():
    ours = circle.Circle(HashStore(), lambda: None, lambda: True)
    reason = f"{os.fsdecode(bytes([255]))}.png: is missing."
    assert ours.is_first_to_say(reason) and not ours.is_first_to_say(reason)


@pytest.mark.parametrize(("own", "is_traced"), [(None, False), ("INFO", True)])
def test_a_store_that_is_lost_within_a_word_leaves_no_trace_of_torchs(own, is_traced):
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CPP_LOG_LEVEL"}
    environment |= {} if own is None else {"TORCH_CPP_LOG_LEVEL": own}
    with reserved_port() as port:
        done = subprocess.run(
            [sys.executable, store_lost.__file__, str(port)],
            capture_output=True, text=True, env=environment, timeout=120,
        )  # fmt: skip
    assert done.stdout.split() == ["here", "lost"]
    assert ("frame #" in done.stderr) == is_traced


# The real thing.


@pytest.fixture
def meet(tmp_path, private_folders):
    """Trains on two ranks, of which one meets with an accident."""
    started = []

    def run(what, who, where, limit=10.0):
        training = TINY["training"] | {"steps": 12, "micro_batch": 4, "hang_timeout": limit}
        config = tmp_path / "config.json"
        config.write_text(json.dumps(TINY | {"training": training}))
        argv = [watched.__file__, config, tmp_path / "run", what, who, where]
        for rank in range(2):
            # Into files: a stopped process would hold a pipe open.
            with (tmp_path / f"output{rank}").open("w") as output:
                environment = os.environ | rank_variables(rank, 2, port)
                started.append(fork(argv, environment, stdout=output, stderr=output))
        codes = [None, None]
        for rank in range(2):
            if what != "stop" or rank != who:
                started[rank].join(240)
                codes[rank] = started[rank].exitcode
        return codes, [(tmp_path / f"output{rank}").read_text() for rank in range(2)]

    with reserved_port() as port:
        yield run
    for process in started:
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join(60)


real = pytest.mark.distributed


@real
@pytest.mark.parametrize(
    ("what", "who", "where", "told"),
    [
        ("kill", 1, "step", "is gone: killed or crashed in phase 'step' after step 2."),
        ("kill", 0, "saving", "is gone: killed or crashed in phase 'saving' after step 3."),
        ("kill", 1, "building", "is gone: killed or crashed in phase 'building' after step 0."),
        ("stop", 1, "step", "it was in phase 'step' after step 2. Its process was stopped"),
        ("stop", 0, "drawing pictures", "it was in phase 'drawing pictures' after step 6. Its"),
        ("sleep", 1, "loading data", "hangs: it has been in phase 'loading data' after step 2"),
        ("sleep", 1, "saving", "hangs: it has been in phase 'saving' after step 3"),
        ("raise", 1, "step", "failed in phase 'step' after step 2: the card fell out. Put it"),
        ("fault", 1, "step", "failed in phase 'step' after step 2: ZeroDivisionError: a fault of"),
    ],
)
def test_the_others_name_rank_and_phase_and_stop(what, who, where, told, meet):
    codes, outputs = meet(what, who, where)
    other = outputs[1 - who]
    assert codes[1 - who] == 1
    errors = [line for output in outputs for line in output.splitlines() if "error: " in line]
    (line,) = [line for line in errors if "ZeroDivisionError: a" not in line or "rank" in line]
    if what in ("raise", "fault"):  # it knows best itself
        assert line in outputs[who].splitlines()
    assert line.startswith(f"error: rank {who} (host ")
    assert told in line
    assert line.endswith("Run the same command again: it continues from the newest checkpoint.")
    assert "Traceback" not in other and "frame #" not in other
    if what == "sleep":  # hung, it hears of it and ends too, without blaming anyone
        assert "error: " not in outputs[who]


@real
def test_nothing_is_said_when_nothing_happens_and_a_slow_rank_is_waited_for(meet):
    """Rank 0 alone is slow where a rank may be, for longer than the limit and the grace."""
    codes, outputs = meet("wait", 0, "drawing pictures", limit=8.0)
    assert codes == [0, 0]
    assert not any("error" in output or "rank " in output for output in outputs)
