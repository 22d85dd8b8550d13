"""Being told to stop: the signals that ask for it, before any rank is involved."""

import os
import pickle
import signal

import pytest

from imagen_scale.training.preemption import SAME_REQUEST, SIGNALS, Preempted, StopRequest

TOLD = (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM)


def test_the_signals_are_those_of_a_terminal_of_slurm_and_of_the_system():
    assert set(SIGNALS) == set(TOLD)


@pytest.mark.parametrize("signum", TOLD)
def test_a_signal_is_noted_said_and_interrupts_nothing(signum, capsys):
    before = signal.getsignal(signum)
    with StopRequest() as stop:
        assert not stop.signum
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes it on at once: the same request
        assert stop.signum == signum
    said = capsys.readouterr().err
    assert said == f"{signum.name}: saving at the end of this step; again to stop at once\n"
    assert signal.getsignal(signum) == before


@pytest.mark.parametrize("signum", TOLD)
def test_a_signal_that_is_ignored_stays_so(signum):
    """As `nohup` and a shell's background jobs ask for."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signum)
            assert not stop.signum
        assert signal.getsignal(signum) == signal.SIG_IGN
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize("signum", TOLD)
def test_the_exit_code_is_128_and_the_signal_on_every_rank(signum):
    sent = pickle.loads(pickle.dumps(Preempted("stopped.", signum)))
    assert (str(sent), sent.exit_code) == ("stopped.", 128 + signum)


@pytest.mark.parametrize("signum", TOLD)
def test_a_second_request_ends_the_process_at_once(signum):
    child = os.fork()
    if child == 0:
        with StopRequest() as stop:
            stop._note(signal.SIGUSR1, None)
            stop._since -= 2 * SAME_REQUEST
            os.kill(os.getpid(), signum)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signum
