"""Batches on their way to the devices: in order, few ahead, and nothing left behind."""

import contextlib
import threading
import time

import jax
import numpy as np
import pytest

from scaling_perception.data.pipeline import Batches
from scaling_perception.support.errors import UserError
from scaling_perception.timing.data import draw_cache
from scaling_perception.training.feed import ahead


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    cache = draw_cache(tmp_path_factory.mktemp("feed") / "cache", 64, 2)
    return Batches({"cache": str(cache), "flip": True}, 8, 3)


def test_batches_that_grain_reads_wait_on_the_devices(batches):
    threads, put = set(threading.enumerate()), []

    def to_device(batch):
        put.append(batch["key"])
        return batch["key"], jax.device_put(batch["target"])

    read = batches.iterate(5)
    fed = ahead(read, to_device)
    for step in range(5, 9):
        keys, target = next(fed)
        assert isinstance(target, jax.Array) and keys == batches.at(step)["key"]
        np.testing.assert_array_equal(target, batches.at(step)["target"])
    deadline = time.monotonic() + 5
    while len(put) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(put) == 6  # one waits, and one more is ready to follow it
    for stage in (read, fed):
        stage.close()
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)
        assert not thread.is_alive()


def test_what_goes_wrong_on_the_way_is_raised(batches):
    def refuse(batch):
        raise UserError("does not fit")

    with contextlib.closing(batches.iterate(0)) as read, pytest.raises(UserError, match="does not fit"):
        next(ahead(read, refuse))


def test_other_batches_are_put_when_they_are_asked_for():
    taken = []
    fed = ahead((taken.append(step) or step for step in range(9)), lambda step: -step)
    assert [next(fed), next(fed)] == [0, -1] and taken == [0, 1]
