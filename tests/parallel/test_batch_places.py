"""Which places of a batch a process reads: from the sharding alone, however hosts and mesh lie to each other."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from scaling_perception.parallel.mesh import AXES, batch_sharding
from scaling_perception.parallel.processes import own_places, part_of, places_of, put_batch
from scaling_perception.support.errors import UserError

SIZE = 16
PAIRS = {device: number // 2 for number, device in enumerate(jax.devices())}  # four hosts of two devices


def sharding_of(sizes, order=range(8)):
    devices = np.array([jax.devices()[i] for i in order])
    return batch_sharding(Mesh(devices.reshape([sizes.get(axis, 1) for axis in AXES]), AXES))


@pytest.mark.parametrize(
    ("sizes", "order", "first", "second"),
    [
        ({"data": 8}, range(8), [0, 1, 2, 3], [4, 5, 6, 7]),
        ({"data": 8}, [0, 2, 4, 6, 1, 3, 5, 7], [0, 1, 8, 9], [2, 3, 10, 11]),  # hosts interleave
        ({"data": 8}, [7, 6, 5, 4, 3, 2, 1, 0], [12, 13, 14, 15], [8, 9, 10, 11]),
        ({"data": 2, "tensor": 4}, range(8), range(8), range(8)),  # two hosts compute the same rows
        ({"tensor": 8}, range(8), range(16), range(16)),
        ({"data": 2, "tensor": 4}, [0, 4, 1, 5, 2, 6, 3, 7], range(8), range(8, 16)),
        ({"fsdp": 4, "tensor": 2}, [0, 2, 4, 6, 1, 3, 5, 7], [0, 1, 2, 3, 8, 9, 10, 11], [0, 1, 2, 3, 8, 9, 10, 11]),
        ({"data": 2, "fsdp": 2, "expert": 2}, [0, 2, 1, 4, 3, 6, 5, 7], [0, 1, 4, 5], [2, 3, 8, 9]),
    ],
)
def test_places_follow_the_devices(sizes, order, first, second):
    sharding = sharding_of(sizes, order)
    places = places_of(sharding, SIZE, PAIRS.__getitem__)
    assert places[0].tolist() == list(first) and places[1].tolist() == list(second)
    assert sorted(places) == [0, 1, 2, 3] and set(np.concatenate([*places.values()])) == {*range(SIZE)}
    whole = np.arange(SIZE * 6).reshape(SIZE, 3, 2)
    for device, index in sharding.devices_indices_map(
        whole.shape
    ).items():  # from its own rows a host serves each device
        held = places[PAIRS[device]]
        np.testing.assert_array_equal(part_of(whole[held], held, index, SIZE), whole[index])


def test_a_batch_that_is_not_the_batch_is_refused(monkeypatch):
    sharding = sharding_of({"data": 4, "tensor": 2})
    with pytest.raises(UserError, match="batch of 6 cannot be shared by 4"):
        own_places(sharding, 6)
    whole = {"x": np.arange(48.0, dtype=np.float32).reshape(16, 3), "task": np.arange(16)}
    with pytest.raises(ValueError, match="a batch of 32 has 32 rows in this process, not"):
        put_batch(whole, sharding, 32)
    with pytest.raises(ValueError, match="not .15, 16."):
        put_batch({**whole, "task": np.arange(15)}, sharding)
    alone = put_batch(whole, sharding)
    monkeypatch.setattr("jax.process_count", lambda: 2)  # this one still holds all places
    several = put_batch(whole, sharding, SIZE)
    for name, array in several.items():
        np.testing.assert_array_equal(array, whole[name])
        assert array.sharding == alone[name].sharding == sharding and array.dtype == alone[name].dtype
