"""Signals that end a run."""

import os
import signal
import time

import pytest

from lab.runner.batch import interruptible


class Collected:
    """The signal arrives while the garbage collector calls back, where Python drops exceptions."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        for _ in range(1000):
            time.sleep(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost(number):
    went_on = []

    def work():
        with interruptible():
            one = Collected(number)
            del one
            went_on.append(True)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert went_on, "the exception was not dropped: this test shows nothing"
