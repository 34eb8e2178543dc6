import errno
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scaling_perception.support.errors import UserError
from scaling_perception.training.checkpoints import Checkpoints, describe_leaves
from scaling_perception.training.state import TrainState, named_leaves, new_state

TX = optax.adam(1e-3)
IDENTITY = {"config": {"optim": {"lr": 1e-3}}}


def state_at(step, shape=(40, 30)):
    params = {"kernel": jax.random.normal(jax.random.key(step), shape), "low": jnp.ones(3, jnp.bfloat16)}
    return new_state(params, TX)._replace(step=jnp.asarray(step, jnp.int32))


def abstract_of(state):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state)


@pytest.fixture
def saved(tmp_path):
    """Checkpoints 1, 2 and 3, of which two are kept."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        assert checkpoints.save(state_at(step), IDENTITY)
    yield checkpoints
    checkpoints.close()


def restore(checkpoints, check=lambda identity: None):
    lines = []
    return checkpoints.restore(abstract_of(state_at(0)), check, lines.append), lines


def damage(checkpoints, step, how):
    """Change the largest array file of a checkpoint."""
    files = [path for path in (checkpoints.folder / str(step)).rglob("d/*") if path.is_file()]
    path = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content) if how == "flip" else bytes(content[: len(content) // 2]))


def test_round_trip_is_bit_exact_and_the_oldest_goes(saved):
    assert saved.steps() == [2, 3]
    seen = []
    state, lines = restore(saved, seen.append)
    assert isinstance(state, TrainState) and not lines
    expected = named_leaves(state_at(3))
    for name, leaf in named_leaves(state).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected[name]), err_msg=name)
        assert leaf.dtype == expected[name].dtype
    assert seen == [IDENTITY]


def test_the_same_step_is_saved_once(saved):
    assert not saved.save(state_at(3), IDENTITY)


def test_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", keep=1)
    assert restore(checkpoints) == (None, [])
    checkpoints.close()


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(saved, how):
    damage(saved, 3, how)
    state, lines = restore(saved)
    assert int(state.step) == 2
    np.testing.assert_array_equal(state.params["kernel"], state_at(2).params["kernel"])
    assert len(lines) == 1 and "checkpoint 3 is damaged" in lines[0] and "going back to step 2" in lines[0]
    assert (saved.folder.parent / "damaged" / "3").is_dir()
    assert saved.save(state_at(3), IDENTITY)  # its place is free again


def test_damaged_metadata_is_noticed(saved):
    path = saved.folder / "3" / "meta" / "metadata"
    path.write_text(path.read_text().replace("0.001", "0.002"))
    state, lines = restore(saved)
    assert int(state.step) == 2 and "its own hash" in lines[0]


def test_all_damaged_is_an_error(saved):
    for step in (2, 3):
        shutil.rmtree(saved.folder / str(step) / "state")
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        restore(saved)


def test_another_shape_names_the_leaf(saved):
    with pytest.raises(UserError, match=r"ema/kernel is \['float32', \[40, 30\]\] in the checkpoint and .*\[40, 31\]"):
        saved.restore(abstract_of(state_at(0, (40, 31))), lambda identity: None, print)
    assert saved.steps() == [2, 3]  # a wrong config is no damage


def test_a_refusal_reads_no_array_and_moves_nothing(saved):
    damage(saved, 3, "truncate")

    def refuse(identity):
        raise UserError("no")

    with pytest.raises(UserError, match="^no$"):
        restore(saved, refuse)
    assert saved.steps() == [2, 3]


def test_too_little_room_is_refused_before_writing(saved, monkeypatch):
    usage = shutil.disk_usage(saved.folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="cannot save step 4 .*checkpoint 3 is kept"):
        saved.save(state_at(4), IDENTITY)
    assert saved.steps() == [2, 3] and restore(saved)[0] is not None


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError('RESOURCE_EXHAUSTED: Error writing "params": Failed to write 527734 bytes: No space left on device'),
    ],
)
def test_a_disk_that_fills_while_saving_keeps_the_last_good_one(saved, monkeypatch, error):
    def fail(step, **_):
        (saved.folder / f"{step}.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
        raise error

    monkeypatch.setattr(saved._manager, "save", fail)
    with pytest.raises(UserError, match="free space and run the same command again .checkpoint 3 is kept."):
        saved.save(state_at(4), IDENTITY)
    assert not list(saved.folder.glob("4*"))
    monkeypatch.undo()
    assert int(restore(saved)[0].step) == 3


def test_hashes_tell_dtype_shape_and_every_bit():
    rows = describe_leaves({"a": np.zeros(4, np.float32), "b": np.zeros((0, 2), np.float32), "c": np.float32(0)})
    assert rows["a"][:2] == ["float32", [4]] and rows["b"] == ["float32", [0, 2], ""] and rows["c"][1] == []
    other = np.zeros(4, np.float32)
    other.view(np.uint32)[3] = 1  # the smallest denormal
    assert describe_leaves({"a": other})["a"][2] != rows["a"][2]


def test_keep_and_folder_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"train\.keep is 0"):
        Checkpoints(tmp_path / "a", keep=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --workdir"):
        Checkpoints(tmp_path / "file" / "x", keep=1)
