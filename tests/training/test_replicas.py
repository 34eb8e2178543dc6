import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from toys import config_of, linear_objective

from scaling_perception import train as verb
from scaling_perception.parallel import processes
from scaling_perception.parallel.mesh import batch_sharding, make_mesh
from scaling_perception.parallel.processes import put_batch
from scaling_perception.support.errors import UserError
from scaling_perception.training import averaging
from scaling_perception.training.replicas import differing, replica_sums


def bent(leaf, places, by=1):
    """``leaf`` with the last bit of its first number flipped on the devices at these places of the mesh."""
    devices = [leaf.sharding.mesh.devices.flat[place] for place in places]
    parts = []
    for shard in leaf.addressable_shards:
        data = np.array(shard.data)
        if shard.device in devices:
            data.reshape(-1)[:1].view(np.uint32)[:] ^= by
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


@pytest.fixture
def tree():
    mesh = make_mesh(data=2, fsdp=4)
    values = np.arange(32, dtype=np.float32).reshape(4, 8)
    return {
        "step": jax.device_put(np.int32(7), NamedSharding(mesh, PartitionSpec())),
        "whole": jax.device_put(values, NamedSharding(mesh, PartitionSpec())),
        "split": jax.device_put(values, NamedSharding(mesh, PartitionSpec(None, "fsdp"))),
        "spread": jax.device_put(values, NamedSharding(mesh, PartitionSpec("fsdp", "data"))),
    }


def test_equal_copies_pass_and_leaves_without_copies_are_left_out(tree):
    table = replica_sums(tree)
    assert not differing(table)
    assert [name for names, _, _ in table.parts for name in names] == ["split", "step", "whole"]
    assert not differing(replica_sums({"a": jnp.ones(3), "b": np.ones(3)}))


@pytest.mark.parametrize(
    ("name", "places", "words"),
    [
        ("whole", [5], "whole differs between device 5 .process 0. and device 0 .process 0., 1 .process 0., 2 "),
        ("step", [0], "step differs between device 0 .process 0. and device 1 "),
        ("split", [6], "split differs between device (2|6) .process 0. and device (6|2) .process 0.$"),  # two hold it
        ("whole", [1, 2], "whole differs between device 1 .process 0., 2 .process 0. and device 0 "),
    ],
)
def test_one_bit_of_one_device_is_found_and_named(tree, name, places, words):
    import re

    table = replica_sums({**tree, name: bent(tree[name], places)})
    assert re.match(words, differing(table)), differing(table)


def test_copies_in_host_memory_are_compared_too(tree):
    place = tree["whole"].sharding.with_memory_kind(averaging.HOST)
    assert not differing(replica_sums({"ema": jax.device_put(tree["whole"], place)}))
    bad = jax.device_put(bent(tree["whole"], [3]), place)
    assert "ema differs between device 3 " in differing(replica_sums({**tree, "ema": bad}))


def linear_run(monkeypatch, workdir, *overrides):
    objective = linear_objective()
    monkeypatch.setattr(verb, "_objective", lambda config, *_: objective)
    return verb.train(config_of(*overrides), workdir)


def steps_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("every", [3, 100])
def test_a_diverged_state_stops_the_run_and_is_not_saved(monkeypatch, tmp_path, every):
    around = averaging.with_ema_update

    def err(*given):
        advance = around(*given)

        def run(number, *rest):
            state, metrics = advance(number, *rest)
            if number == 6:  # a device has computed one wrong bit
                kernel = bent(state.params["layer"]["kernel"], [2])
                state = state._replace(params={**state.params, "layer": {**state.params["layer"], "kernel": kernel}})
            return state, metrics

        return run

    monkeypatch.setattr(averaging, "with_ema_update", err)
    found = 6 if every == 3 else 8  # between checks it is the save that looks
    words = (
        f"differ at step {found}: params/layer/kernel differs between device 2 .*; nothing of it is saved .step 4 is"
    )
    with pytest.raises(UserError, match=words) as told:
        linear_run(monkeypatch, tmp_path, f"train.check_replicas={every}")
    assert "\n" not in str(told.value) and steps_of(tmp_path) == [4]


def test_a_sound_run_passes(monkeypatch, tmp_path):
    linear_run(monkeypatch, tmp_path, "train.check_replicas=2")
    assert steps_of(tmp_path) == [8, 12]
    with pytest.raises(UserError, match="train.check_replicas is -1"):
        linear_run(monkeypatch, tmp_path, "train.check_replicas=-1")


def test_other_inputs_are_not_blamed_on_a_device(monkeypatch, tmp_path):
    """Where the mesh's tensor axis spans hosts, both read the same rows: one host's file differs in one bit."""
    taken = []

    def put(batch, *where):
        arrays = put_batch(batch, *where)
        taken.append(batch)
        return {**arrays, "x": bent(arrays["x"], [3])} if len(taken) == 6 else arrays

    monkeypatch.setattr(processes, "put_batch", put)
    processes.own_places(batch_sharding(make_mesh(tensor=2)), 8)  # known before another host is made up
    monkeypatch.setattr(processes, "places_of", lambda *_: {0: np.arange(8), 1: np.arange(8)})
    words = (
        "different data for the same places of step 6's batch: x differs between device (2|3) .process 0. and device"
    )
    with pytest.raises(UserError, match=words):
        linear_run(monkeypatch, tmp_path, "train.check_replicas=100", "mesh.tensor=2")
    assert steps_of(tmp_path) == [4]
