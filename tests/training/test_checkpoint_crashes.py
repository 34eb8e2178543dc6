"""What really happens to disks and processes: nothing but whole checkpoints comes back, and the newest that is whole.

This file is also the program of the processes that are killed: ``python test_checkpoint_crashes.py ROLE ...``.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from toys import small_disk

from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.support.errors import UserError
from scaling_perception.training import checkpoints as module
from scaling_perception.training import saving
from scaling_perception.training.checkpoints import Checkpoints
from scaling_perception.training.state import named_leaves, new_state

IDENTITY = {"config": {"optim": {"lr": 1e-3}}, "data": {"length": 64}, "meta": {"vae": "tiny"}}
SPECS = {"experts": P("expert", "fsdp"), "kernel": P("fsdp"), "low": P()}


def value(name, step, shape):
    """Any numbers that depend on the step in every element."""
    numbers = np.random.default_rng([step, len(name)]).normal(size=shape)
    return jnp.asarray(numbers, jnp.bfloat16 if name == "low" else jnp.float32)


def state_at(step):
    shapes = {"experts": (4, 8, 6), "kernel": (64, 48), "low": (16,)}
    params = {name: value(name, step, shape) for name, shape in shapes.items()}
    state = new_state(params, optax.adam(1e-3))._replace(step=jnp.asarray(step, jnp.int32))
    return state._replace(ema=jax.tree.map(lambda leaf: leaf * 2, state.ema))


def places_of(state, mesh):
    """Where the leaves of ``state`` go: by their names."""

    def place(path, _):
        return NamedSharding(mesh, SPECS.get(str(getattr(path[-1], "key", "")), P()))

    return jax.tree_util.tree_map_with_path(place, state)


def abstract_on(mesh):
    state = jax.eval_shape(lambda: state_at(0))
    places = places_of(state, mesh)
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, places)


def put(state, mesh):
    """``state``, the same in every process, on a mesh over all of them."""

    def spread(leaf, place):
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

    return jax.tree.map(spread, state, places_of(state, mesh))


def differing(state, expected):
    """Names of leaves of which this process holds other numbers than ``expected`` has."""
    right = {name: np.asarray(leaf) for name, leaf in named_leaves(expected).items()}
    parts = [(name, part) for name, leaf in named_leaves(state).items() for part in leaf.addressable_shards]
    return [name for name, part in parts if not np.array_equal(np.asarray(part.data), right[name][part.index])]


def restore(folder, mesh=None):
    checkpoints, lines = Checkpoints(folder, keep=3), []
    state = checkpoints.restore(abstract_on(mesh or make_mesh()), lambda identity: None, lines.append)
    checkpoints.close()
    return state, lines


# ---- Damaged files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Checkpoints 1 and 2 of a state on eight devices."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    checkpoints, mesh = Checkpoints(folder, keep=3), make_mesh(data=1, fsdp=2, expert=4)
    for step in (1, 2):
        checkpoints.save(put(state_at(step), mesh), IDENTITY)
    checkpoints.close()
    return folder


def kinds(folder):
    """Kind of file (its path in a checkpoint, without the hash in its name) -> the largest one of that kind."""
    files = [path.relative_to(folder / "2") for path in (folder / "2").rglob("*") if path.is_file()]
    files.sort(key=lambda path: (folder / "2" / path).stat().st_size)
    return {"/".join("*" if len(part) == 32 else part for part in path.parts): path for path in files}


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))


def truncate(path, draw):
    os.truncate(path, draw.randrange(path.stat().st_size - 1))  # a document without its last line end says the same


def delete(path, draw):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_damage_to_each_kind_of_file_is_noticed_or_harmless(whole, tmp_path, damage):
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    items = ("state", "ema") if damage is flip else ("state",)
    found = {name: path for name, path in kinds(whole).items() if not name.startswith("ema") or "ema" in items}
    vital = {f"{item}/{name}" for item in items for name in ("manifest.ocdbt", "d/*", "ocdbt.process_0/d/*")}
    vital |= {"config/metadata", "data/metadata", "meta/metadata"}
    assert vital <= found.keys()
    noticed = set()
    for number, (name, path) in enumerate(found.items()):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(whole, folder)
        damage(folder / "2" / path, draw)
        state, lines = restore(folder)
        step = int(state.step)
        assert not differing(state, state_at(step)), (name, seed)
        assert (step, len(lines)) in ((2, 0), (1, 1)), (name, seed)
        noticed |= {name} if step == 1 else set()
    print(damage.__name__, seed, "harmless:", sorted(found.keys() - noticed))
    # a bit, or the last bytes of what a process wrote before it was merged, may lie where nothing is
    loose = {flip: vital, truncate: {f"{item}/ocdbt.process_0/d/*" for item in items}}
    assert vital - loose.get(damage, set()) <= noticed


def test_every_byte_of_the_numbers_counts(whole, tmp_path):
    draw = random.Random(0)
    biggest = max((whole / "2" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    for number in range(3):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(whole, folder)
        flip(folder / biggest.relative_to(whole), draw)
        state, _ = restore(folder)
        assert int(state.step) == 1 and not differing(state, state_at(1))


@pytest.mark.parametrize("item", ["state", "ema", "config", "data", "meta"])
def test_a_deleted_item(whole, tmp_path, item):
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "2" / item)
    state, lines = restore(folder)
    assert int(state.step) == 1 and not differing(state, state_at(1)) and "going back to step 1" in lines[0]


# ---- Full disks ------------------------------------------------------------------------------------------------------


def big_state(step):
    state = state_at(step)
    return state._replace(params=state.params | {"kernel": value("kernel", step, (700, 700))})


def assert_a_full_disk_is_told(checkpoints):
    checkpoints.save(state_at(1), IDENTITY, wait=True)
    with contextlib.ExitStack() as stack:
        if not os.path.ismount(checkpoints.folder.parent):
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        checkpoints.save(big_state(2), IDENTITY)  # the buffers are free, and the error is still to come
        with pytest.raises(UserError, match=r"cannot save step 2 .*free space .*checkpoint 1 is kept"):
            for _ in range(600):
                checkpoints.poll()
                time.sleep(0.1)
        assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["1"]  # and its space is free again
    checkpoints.save(state_at(3), IDENTITY, wait=True)
    checkpoints.close()
    state, lines = restore(checkpoints.folder)
    assert int(state.step) == 3 and not lines and not differing(state, state_at(3))


def test_a_file_that_cannot_grow(tmp_path):
    assert_a_full_disk_is_told(Checkpoints(tmp_path / "checkpoints", keep=2))


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    with small_disk(tmp_path, megabytes=1) as disk:
        usage = shutil.disk_usage(disk)._replace(free=10**12)  # it was free when we looked
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        assert_a_full_disk_is_told(Checkpoints(disk / "checkpoints", keep=2))


# ---- Killed processes ------------------------------------------------------------------------------------------------


def environment(devices):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last one counts
    cached = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**os.environ, **cached, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def start(*words, devices):
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(devices))


def save_for_ever(folder, first):
    """Save one state after another and tell of each that is finished."""
    checkpoints, mesh = Checkpoints(folder, keep=2), make_mesh()
    for step in range(first, 10**6):
        checkpoints.save(put(state_at(step), mesh), IDENTITY)  # waits for the one before
        if step > first:
            print("finished", step - 1, flush=True)


def breed(folder):
    """A process that has imported everything and whose children save for ever; each line of stdin asks for a child."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            save_for_ever(Path(folder), int(line))
        print("child", child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)


def test_killed_while_saving_at_any_moment(tmp_path):
    folder = tmp_path / "checkpoints"
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    print("seed", seed)
    halves = 0
    words = [sys.executable, __file__, "breed", str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, text=True, bufsize=1, env=environment(8), **pipes) as breeder:
        next_step = 1
        for _ in range(6):
            breeder.stdin.write(f"{next_step}\n")
            child, last, deadline, killed = 0, next_step - 1, float("inf"), False
            for line in breeder.stdout:
                word, _, number = line.strip().partition(" ")
                if word == "dead":
                    break
                child = int(number) if word == "child" else child
                last = int(number) if word == "finished" else last
                if word == "finished" and deadline == float("inf"):
                    deadline = time.monotonic() + draw.uniform(0, 0.6)
                if time.monotonic() > deadline and not killed:  # lines it wrote before are still to come
                    time.sleep(draw.uniform(0, 0.15))
                    os.kill(child, signal.SIGKILL)
                    killed = True
            halves += any("tmp" in path.name for path in folder.iterdir())
            state, lines = restore(folder)
            step = int(state.step)
            assert step >= last and not lines and not differing(state, state_at(step)), (seed, step, last, lines)
            next_step = step + 1
        breeder.stdin.close()
    assert halves > 0, "no kill hit a save under way"


# ---- Several processes -----------------------------------------------------------------------------------------------


def work_together(folder, index, port):
    """One of two processes with four devices each."""
    folder, index = Path(folder), int(index)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    mesh = make_mesh(data=1, fsdp=2, expert=4)
    checkpoints, lines = Checkpoints(folder, keep=3), []

    def restored():
        state = checkpoints.restore(abstract_on(mesh), lambda identity: None, lines.append)
        step = int(state.step)
        assert not differing(state, state_at(step))
        return step

    def save(step, **options):
        checkpoints.save(put(state_at(step), mesh), IDENTITY, **options)

    # what one process saved on another mesh
    assert restored() == 1 and not lines
    save(2)
    while 2 not in checkpoints.steps():
        checkpoints.poll()
    save(3, wait=True)
    assert checkpoints.steps() == [1, 2, 3] and restored() == 3

    # a write that fails in the second alone
    written = saving.Saving.written

    def fail(self):
        written(self)
        if index == 1:
            raise OSError("No space left on device")

    saving.Saving.written = fail
    save(4)
    saving.Saving.written = written
    told = ""
    for _ in range(1000):
        try:
            checkpoints.poll()
        except UserError as error:
            told = str(error)
            break
    assert "cannot save step 4" in told and ("No space left" if index else "process 1 failed") in told, told
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]

    # a folder that the second alone cannot read
    read = module._read_documents

    def cannot(place):
        if index == 1 and place.name == "3":
            raise OSError("Input/output error")
        return read(place)

    module._read_documents = cannot
    assert restored() == 2 and checkpoints.steps() == [1, 2]
    assert len(lines) == (index == 0) and all("checkpoint 3 is damaged" in line for line in lines)
    module._read_documents = read
    print("ready", flush=True)

    for step in range(5, 10**6):  # until we are killed
        save(step)
        for _ in range(3):
            checkpoints.poll()
        if step > 5:
            print("finished", step - 1, flush=True)


def test_two_processes_save_and_restore_together_and_one_alone_elsewhere(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints, mesh = Checkpoints(folder, keep=1), make_mesh()
    checkpoints.save(put(state_at(1), mesh), IDENTITY, wait=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    both = [start("work_together", folder, index, port, devices=4) for index in range(2)]
    watch = threading.Timer(120, both[0].kill)
    watch.start()
    try:
        last = 0
        for line in both[0].stdout:  # gloo talks there too
            if line.startswith("finished"):
                last = int(line.split()[1])
            if last == 7:
                break
        assert last == 7, "a process failed: its own words are above"
        time.sleep(random.uniform(0, 0.3))
    finally:
        watch.cancel()
        for process in both:
            process.kill()
        for process in both:
            process.communicate()
    state, lines = restore(folder, make_mesh(data=2, fsdp=4))
    step = int(state.step)
    assert step >= last and not lines and not differing(state, state_at(step))


if __name__ == "__main__":
    try:
        role, *rest = sys.argv[1:]
        {"breed": breed, "work_together": work_together}[role](*rest)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # waits for no other process
