"""Reading ahead and writing behind: order, bounds, errors, interruption."""

import os
import signal
import threading
import time

import pytest

from scaling_perception.support.overlap import WriteBehind, read_ahead, stopped_by_sigterm


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_and_few_wait(workers):
    begun = []

    def read(i):
        begun.append(i)
        time.sleep(0.002 * (i % 3))
        return i * i

    for taken, value in enumerate(read_ahead(range(30), read, workers, 4)):
        assert value == taken * taken
        assert len(begun) <= taken + 4
    assert sorted(begun) == list(range(30))


def test_reading_stops_with_its_user():
    begun = []
    reading = read_ahead(range(1000), begun.append, 2, 4)
    next(reading)
    reading.close()
    count = len(begun)
    assert count <= 6 and threading.active_count() < 20
    time.sleep(0.02)
    assert len(begun) == count


def test_an_error_comes_at_its_place():
    reading = read_ahead([4, 0, 2], lambda i: 8 // i, 2, 3)
    assert next(reading) == 2
    with pytest.raises(ZeroDivisionError):
        next(reading)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_was_handed_over_is_written_whatever_happens(workers):
    done = []

    def slow(i):
        time.sleep(0.01)
        done.append(i)

    with pytest.raises(KeyboardInterrupt), WriteBehind(workers, 3) as write:
        for i in range(3):
            write(slow, i)
        raise KeyboardInterrupt
    assert done == [0, 1, 2]


def test_a_write_that_fails_stops_the_caller():
    def fail():
        raise OSError("full")

    with pytest.raises(OSError, match="full"), WriteBehind(1, 2) as write:
        for _ in range(50):
            write(fail)
            time.sleep(0.001)
        pytest.fail("the caller went on")
    with pytest.raises(OSError, match="full"), WriteBehind(1, 2) as write:
        write(fail)


def test_sigterm_leaves_the_block():
    before, left = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(SystemExit) as stop:
        with stopped_by_sigterm():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            finally:
                left.append(True)
    assert stop.value.code == 143 and left and signal.getsignal(signal.SIGTERM) is before
