import errno
import json
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.support.errors import UserError
from scaling_perception.training import saving
from scaling_perception.training.checkpoints import Checkpoints, load_ema
from scaling_perception.training.state import TrainState, named_leaves, new_state

TX = optax.adam(1e-3)
IDENTITY = {"config": {"optim": {"lr": 1e-3}}, "data": {"length": 64}, "meta": {"vae": "tiny"}}
ONE = SingleDeviceSharding(jax.devices()[0])


def state_at(step, shape=(40, 30)):
    params = {"layer": {"kernel": jax.random.normal(jax.random.key(step), shape)}, "low": jnp.ones(3, jnp.bfloat16)}
    state = new_state(params, TX)._replace(step=jnp.asarray(step, jnp.int32))
    return state._replace(ema=jax.tree.map(lambda leaf: leaf * 2, state.ema))


def abstract_of(state, place=ONE, dtype=None):
    def abstract(leaf):
        floats = dtype and jnp.issubdtype(leaf.dtype, jnp.floating)
        where = place if leaf.ndim == 2 or place is ONE else NamedSharding(place.mesh, P())
        return jax.ShapeDtypeStruct(leaf.shape, dtype if floats else leaf.dtype, sharding=where)

    return jax.tree.map(abstract, state)


def same(tree, other):
    left, right = named_leaves(tree), named_leaves(other)
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        assert leaf.dtype == right[name].dtype, name
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(right[name]), err_msg=name)


@pytest.fixture
def saved(tmp_path):
    """Checkpoints 1, 2 and 3, of which two are kept."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        assert checkpoints.save(state_at(step), IDENTITY)
    checkpoints.wait()
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


# ---- What is saved ---------------------------------------------------------------------------------------------------


def test_round_trip_is_bit_exact_and_the_oldest_goes(saved):
    assert saved.steps() == [2, 3]
    seen = []
    state, lines = restore(saved, seen.append)
    assert isinstance(state, TrainState) and not lines
    same(state, state_at(3))
    assert seen == [IDENTITY]


def test_the_same_step_is_saved_once(saved):
    assert not saved.save(state_at(3), IDENTITY)


def test_items_are_separate_and_plain_orbax_reads_them(saved):
    place = saved.folder / "3"
    assert {path.name for path in place.iterdir()} == {"state", "ema", "config", "data", "meta"}
    assert json.loads((place / "config" / "metadata").read_text()) == IDENTITY["config"]
    with ocp.StandardCheckpointer() as reader:
        ema = reader.restore(place / "ema", abstract_of(state_at(0).ema))
    same(ema, state_at(3).ema)


def test_the_average_alone(saved):
    ema, step = load_ema(saved.folder)
    assert step == 3
    same(ema, state_at(3).ema)
    split = NamedSharding(make_mesh(data=1, fsdp=8), P("fsdp"))
    ema, _ = load_ema(saved.folder, abstract_of(state_at(0).ema, split))
    same(ema, state_at(3).ema)
    assert ema["layer"]["kernel"].sharding == split
    path = next(path for path in (saved.folder / "3" / "ema" / "d").iterdir())
    path.write_bytes(path.read_bytes()[:-9])
    lines = []
    ema, step = load_ema(saved.folder, warn=lines.append)
    assert step == 2 and len(lines) == 1 and "checkpoint 3 in" in lines[0] and saved.steps() == [2, 3]
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        load_ema(saved.folder / "nowhere")


def test_a_folder_that_is_named_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(Path("run/checkpoints"), keep=2)
    checkpoints.save(state_at(1), IDENTITY, wait=True)
    state, _ = restore(checkpoints)
    same(state, state_at(1))
    assert load_ema(Path("run/checkpoints"))[1] == 1
    checkpoints.close()


def test_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", keep=1)
    assert restore(checkpoints) == (None, [])
    checkpoints.close()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep": 1}, [6]),
        ({"keep": 2, "keep_every": 3}, [3, 5, 6]),
        ({"keep": 1, "keep_best": 2, "metric": "error"}, [2, 4, 6]),
        ({"keep": 1, "keep_every": 5, "keep_best": 1, "metric": "error"}, [4, 5, 6]),
        ({"keep": 1, "keep_best": 1, "metric": "absent"}, [6]),
    ],
)
def test_which_are_kept(tmp_path, options, kept):
    errors = [3.0, 1.0, float("nan"), 0.5, 2.0, 9.0]
    for part in (errors[:4], errors[4:]):  # a run and its continuation
        checkpoints = Checkpoints(tmp_path, **options)
        for error in part:
            step = errors.index(error) + 1
            checkpoints.save(state_at(step, (2, 2)), IDENTITY, metrics={"error": jnp.float32(error)})
        checkpoints.close()
    assert checkpoints.steps() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(step) for step in kept]


# ---- Where and as what it is restored --------------------------------------------------------------------------------


def test_on_another_mesh(tmp_path):
    places = [
        NamedSharding(make_mesh(), P()),
        NamedSharding(make_mesh(data=1, fsdp=8), P("fsdp")),
        NamedSharding(make_mesh(data=1, fsdp=2, tensor=4), P("tensor", "fsdp")),
        ONE,
    ]
    expected = state_at(1)
    for number, place in enumerate(places):
        checkpoints = Checkpoints(tmp_path / str(number), keep=1)
        abstract = abstract_of(expected, place)
        checkpoints.save(
            jax.device_put(expected, jax.tree.map(lambda leaf: leaf.sharding, abstract)), IDENTITY, wait=True
        )
        other = abstract_of(expected, places[(number + 1) % len(places)])
        state = checkpoints.restore(other, lambda identity: None, pytest.fail)
        same(state, expected)
        for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            assert leaf.sharding == wanted.sharding


def test_another_precision_only_when_asked(saved):
    wanted = abstract_of(state_at(0), dtype=jnp.bfloat16)
    with pytest.raises(UserError, match=r"ema/layer/kernel is \['float32', .* in the checkpoint and \['bfloat16"):
        saved.restore(wanted, lambda identity: None, pytest.fail)
    state = saved.restore(wanted, lambda identity: None, pytest.fail, cast=True)
    expected = state_at(3)
    same(state.params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), expected.params))
    assert state.step.dtype == jnp.int32 and int(state.step) == 3
    with pytest.raises(UserError, match="kernel is .*40, 30.*40, 31"):
        saved.restore(abstract_of(state_at(0, (40, 31)), dtype=jnp.bfloat16), lambda identity: None, print, cast=True)


def test_another_shape_names_the_leaf(saved):
    with pytest.raises(UserError, match=r"kernel is \['float32', \[40, 30\]\] in the checkpoint and .*\[40, 31\]"):
        saved.restore(abstract_of(state_at(0, (40, 31))), lambda identity: None, print)
    assert saved.steps() == [2, 3]  # a wrong config is no damage


def test_a_refusal_reads_no_array_and_moves_nothing(saved):
    damage(saved, 3, "truncate")

    def refuse(identity):
        raise UserError("no")

    with pytest.raises(UserError, match="^no$"):
        restore(saved, refuse)
    assert saved.steps() == [2, 3]


def test_the_old_format_is_refused_in_one_line(tmp_path):
    place = tmp_path / "7"
    (place / "meta").mkdir(parents=True)
    (place / "meta" / "metadata").write_text(json.dumps({"identity": {}, "leaves": {}, "digest": ""}))
    with pytest.raises(UserError, match="7 is of another version's format"):
        restore(Checkpoints(tmp_path, keep=1))
    assert place.is_dir()


# ---- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(saved, how):
    damage(saved, 3, how)
    state, lines = restore(saved)
    same(state, state_at(2))
    assert len(lines) == 1 and "checkpoint 3 is damaged" in lines[0] and "going back to step 2" in lines[0]
    assert (saved.folder.parent / "damaged" / "3").is_dir()
    assert saved.save(state_at(3), IDENTITY, wait=True)  # its place is free again
    assert int(restore(saved)[0].step) == 3


@pytest.mark.parametrize("text", ["PERMISSION_DENIED: x", "Too many open files", "RESOURCE_EXHAUSTED: out of memory"])
def test_what_the_machine_refuses_puts_no_checkpoint_aside(saved, monkeypatch, text):
    def refuse(*_, **__):
        raise ValueError(text)

    monkeypatch.setattr("scaling_perception.training.checkpoints.ocp.StandardCheckpointHandler.restore", refuse)
    with pytest.raises(UserError, match="^cannot read .*/3: "):
        restore(saved)
    assert saved.steps()[-1] == 3 and not (saved.folder.parent / "damaged").exists()


@pytest.mark.parametrize("item", ["config", "data", "meta"])
def test_damaged_descriptions_are_noticed(saved, item):
    path = saved.folder / "3" / item / "metadata"
    text = path.read_text()
    path.write_text(
        {"config": text.replace("0.001", "0.002"), "data": "{}", "meta": text.replace("tiny", "tidy")}[item]
    )
    state, lines = restore(saved)
    assert int(state.step) == 2 and "its own hash" in lines[0]


def test_all_damaged_is_an_error(saved):
    for step in (2, 3):
        shutil.rmtree(saved.folder / str(step) / "state")
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        restore(saved)


# ---- While it is written ---------------------------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch):
    """An event that saves wait for before they may end."""
    event, written = threading.Event(), saving.Saving.written

    def hold(self):
        assert event.wait(60)
        written(self)

    monkeypatch.setattr(saving.Saving, "written", hold)
    yield event
    event.set()


@pytest.mark.parametrize("spec", [P(), P("fsdp")])
def test_buffers_may_be_given_away_as_soon_as_save_returns(saved, held, spec):
    place = NamedSharding(make_mesh(data=1, fsdp=8), spec)
    abstract = abstract_of(state_at(4, (512, 256)), place)
    make = jax.jit(lambda: state_at(4, (512, 256)), out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))
    expected = make()
    spoil = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 7, tree), donate_argnums=0)
    jax.block_until_ready(spoil(make()))  # compiled
    state = make()
    assert saved.save(state, IDENTITY)
    for _ in range(3):
        state = spoil(state)
    assert int(state.step) == -7
    assert saved.steps() == [2, 3]  # it is not there yet
    saved.poll()
    held.set()
    saved.wait()
    assert saved.steps() == [3, 4]
    same(saved.restore(abstract, lambda identity: None, pytest.fail), expected)


def test_poll_ends_a_save_and_the_next_save_waits_for_it(saved, held):
    saved.save(state_at(4), IDENTITY)
    threading.Timer(0.3, held.set).start()
    assert saved.save(state_at(5), IDENTITY)
    assert 4 in saved.steps()
    while 5 not in saved.steps():
        saved.poll()
    saved.close()
    assert saved.steps() == [4, 5]


def failing(error, begun, written=saving.Saving.written):
    """Fails once ``begun`` is set: before, the call of ``save`` itself might see the failure."""

    def fail(self):
        written(self)
        assert begun.wait(60)
        raise error

    return fail


@pytest.mark.parametrize("teller", ["poll", "wait", "save", "close"])
def test_a_save_that_fails_is_told_by_whatever_comes_next(saved, monkeypatch, teller):
    error = ValueError(
        'RESOURCE_EXHAUSTED: Error writing "params": Failed to write 527734 bytes: No space left on device'
    )
    begun = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(saving.Saving, "written", failing(error, begun))
        saved.save(state_at(4), IDENTITY)
        begun.set()
        saved._saving.join()
    call = (lambda: saved.save(state_at(5), IDENTITY)) if teller == "save" else getattr(saved, teller)
    with pytest.raises(UserError, match="cannot save step 4 .*free space and run the same .*checkpoint 3 is kept"):
        call()
    assert not list(saved.folder.glob("4*")) and saved.steps() == [2, 3]
    saved.poll()  # told once
    assert saved.save(state_at(5), IDENTITY, wait=True) and saved.steps() == [3, 5]


def test_closing_after_another_error_leaves_that_one(saved, monkeypatch, capsys):
    begun = threading.Event()
    monkeypatch.setattr(saving.Saving, "written", failing(OSError(errno.EIO, "Input/output error"), begun))
    saved.save(state_at(4), IDENTITY)
    begun.set()
    with pytest.raises(KeyError, match="first"):
        try:
            raise KeyError("first")
        finally:
            saved.close()
    assert "cannot save step 4" in capsys.readouterr().err


def test_too_little_room_is_refused_before_writing(saved, monkeypatch):
    usage = shutil.disk_usage(saved.folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="cannot save step 4 .*1000|0 MB are free.*free space.*checkpoint 3 is kept"):
        saved.save(state_at(4), IDENTITY)
    assert saved.steps() == [2, 3] and restore(saved)[0] is not None


def test_what_was_half_written_makes_room_and_is_no_checkpoint(saved):
    for name in ("9.orbax-checkpoint-tmp", "1.deleted.orbax-checkpoint-tmp"):
        shutil.copytree(saved.folder / "3", saved.folder / name)
    assert saved.steps() == [2, 3] and int(restore(saved)[0].step) == 3
    saved.save(state_at(4), IDENTITY, wait=True)
    assert sorted(path.name for path in saved.folder.iterdir()) == ["3", "4"]


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"train\.keep is 0"):
        Checkpoints(tmp_path / "a", keep=0)
    with pytest.raises(UserError, match=r"train\.keep_best is -1"):
        Checkpoints(tmp_path / "a", keep=1, keep_best=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --workdir"):
        Checkpoints(tmp_path / "file" / "x", keep=1)
