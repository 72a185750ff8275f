"""SIGTERM and SIGINT: noticed, bounded, and without a trace afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dsee_jax.runtime import preemption

BUSY = """
import hashlib, sys
from dsee_jax.runtime import preemption
preemption.GRACE = float(sys.argv[1])
with preemption.noticed():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, in which Python calls no handler
"""


def stopped_by(number):
    with preemption.noticed():
        assert not preemption.asked()
        os.kill(os.getpid(), number)
        assert preemption.asked()
        raise preemption.stopped("step 1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_noticed_and_gives_the_status_of_a_shell(number):
    before = signal.getsignal(number)
    with pytest.raises(preemption.Preempted, match=f"^{number.name}: saved at step 1; ") as stop:
        stopped_by(number)
    assert stop.value.status == 128 + number
    assert signal.getsignal(number) == before
    assert not preemption.asked()
    assert signal.set_wakeup_fd(-1) == -1


def test_signal_after_the_last_step_stops_the_run():
    with pytest.raises(preemption.Preempted, match="SIGINT"), preemption.noticed():
        os.kill(os.getpid(), signal.SIGINT)


def test_ignored_signal_stays_ignored():
    """As in a shell's background job."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with preemption.noticed():
            os.kill(os.getpid(), signal.SIGINT)
            assert not preemption.asked()
    finally:
        signal.signal(signal.SIGINT, before)


def test_watchers_end_with_their_runs():
    # Threads of other tests may end meanwhile.
    before = set(threading.enumerate())
    for _ in range(3):
        with preemption.noticed():
            pass
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def busy(grace):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, str(grace)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    return process


def test_process_that_does_not_return_to_python_ends_all_the_same():
    """SIGINT ends it after the grace, and a second signal at once."""
    with busy(0.2) as waiting, busy(1000) as hurried:
        try:
            time.sleep(0.1)
            hurried.send_signal(signal.SIGTERM)
            ends = ((waiting, 130, "took more than 0.2 s"), (hurried, 143, "SIGTERM: stopped at once"))
            for process, status, said in ends:
                _, errors = process.communicate(timeout=60)
                assert (process.returncode, errors.count("\n")) == (status, 1)
                assert said in errors
        finally:
            for process in (waiting, hurried):
                process.kill()
