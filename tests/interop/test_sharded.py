"""Weights in several files: readable by others, whole or absent, and never whole in memory."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from scaling_perception.interop import sharded
from scaling_perception.interop.safetensors_io import flatten_tree, unflatten_tree
from scaling_perception.interop.sharded import find_weights, load_sharded, open_sharded, save_sharded
from scaling_perception.models.dit import DiTConfig, abstract_params
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.parallel.rules import tree_shardings
from scaling_perception.support.errors import UserError

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
MOE = DiTConfig(
    "moe", 8, dim=32, depth=2, heads=4, num_classes=11, experts=4, expert_mlp="swiglu", shared_experts=2, qk_norm=True
)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "blocks/kernel": rng.standard_normal((3, 4, 5)).astype(np.float32),
        "half": rng.standard_normal((7,)).astype(jnp.bfloat16),
        "count": np.array(7, np.int32),
        "mask": rng.integers(0, 2, (3, 3)).astype(bool),
        "empty": np.zeros((0, 4), np.float32),
        "last": rng.standard_normal((2, 8)).astype(np.float16),
    }


def whole(tensors):
    return [(name, (), array) for name, array in tensors.items()]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def same(source, tensors):
    assert set(source.shapes) == set(tensors)
    for name, array in tensors.items():
        found = source.read(name)
        assert found.dtype == array.dtype == source.dtypes[name] and found.tobytes() == array.tobytes()
        assert found.shape == array.shape == source.shapes[name]


@pytest.mark.parametrize("limit, count", [(10**6, 1), (250, 2), (20, 4), (1, 6)])
def test_any_number_of_files_holds_the_same_bytes(tmp_path, tensors, limit, count):
    files = save_sharded(tmp_path, tensors, whole(tensors), {"made": "by hand"}, max_shard_bytes=limit)
    assert [file.name for file in files] == names_in(tmp_path)  # the index sorts last
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert len(shards) == count and (len(files) == 1 or files[-1].name == INDEX)
    same(open_sharded(tmp_path), tensors)
    assert open_sharded(tmp_path).metadata == {"made": "by hand"}
    # as other programs read them
    back = {name: array for shard in shards for name, array in load_file(shard).items()}
    assert all(np.array_equal(back[name], array) for name, array in tensors.items())
    with safe_open(shards[0], framework="numpy") as file:
        assert file.metadata() == {"made": "by hand"}
    if count > 1:
        index = json.loads(files[-1].read_text())
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
        assert list(index["weight_map"]) == list(tensors)
        assert shards[0].name == f"model-00001-of-{count:05d}.safetensors"


def test_a_large_tensor_is_alone_and_the_small_ones_stay_together(tmp_path):
    sizes = {"a": 10, "large": 500, "b": 20, "huge": 900, "c": 30, "d": 60}
    tensors = {name: np.full(size, 3, np.uint8) for name, size in sizes.items()}
    save_sharded(tmp_path, tensors, whole(tensors), max_shard_bytes=100)
    files = {}
    for name, file in json.loads((tmp_path / INDEX).read_text())["weight_map"].items():
        files.setdefault(file, []).append(name)
    assert list(files.values()) == [["a", "b", "c"], ["large"], ["huge"], ["d"]]
    same(open_sharded(tmp_path), tensors)


def test_slices_may_come_in_any_order_and_dtype(tmp_path, tensors):
    kernel = tensors["blocks/kernel"]
    slices = [("blocks/kernel", (i, j), kernel[i, j].astype(np.float64)) for i in (2, 0, 1) for j in (3, 1, 0, 2)]
    slices[3:3] = [entry for entry in whole(tensors) if entry[0] != "blocks/kernel"]
    told = []
    save_sharded(tmp_path, tensors, iter(slices), max_shard_bytes=100, progress=lambda *size: told.append(size))
    same(open_sharded(tmp_path), tensors)
    total = sum(array.nbytes for array in tensors.values())
    assert len(told) == len(slices) and told[-1] == (total, total) and told == sorted(told)


def test_slices_that_do_not_make_up_the_tensors_are_a_fault(tmp_path, tensors):
    kernel = tensors["blocks/kernel"]
    rest = [entry for entry in whole(tensors) if entry[0] != "blocks/kernel"]
    for parts, words in (
        ([(0, kernel[0]), (1, kernel[1])], "80 bytes of blocks/kernel were not written"),
        ([(i, kernel[i]) for i in (0, 1, 2, 2)], "-80 bytes of blocks/kernel"),
        ([(i, kernel[i].T) for i in range(3)], r"has shape \(5, 4\), not \(4, 5\)"),
    ):
        with pytest.raises(ValueError, match=words):
            save_sharded(tmp_path, tensors, [*rest, *(("blocks/kernel", (i,), part) for i, part in parts)])
        assert names_in(tmp_path) == []


def test_new_weights_replace_whatever_was_there(tmp_path, tensors):
    other = {name: array + array for name, array in tensors.items()}
    (tmp_path / "config.json").write_text("{}")
    for limit, count in ((10**6, 1), (20, 4), (250, 2), (20, 4), (10**6, 1)):
        for values in (tensors, other):
            files = save_sharded(tmp_path, values, whole(values), max_shard_bytes=limit)
            assert len(files) == (count + 1 if count > 1 else 1)
            assert names_in(tmp_path) == sorted(["config.json", *(file.name for file in files)])
            same(open_sharded(tmp_path), values)
    (tmp_path / "model.safetensors").unlink()
    assert find_weights(tmp_path) is None
    with pytest.raises(UserError, match="has no weights: expected model.safetensors or"):
        load_sharded(tmp_path)


@pytest.mark.parametrize("call, after", [("pwrite", 3), ("pwrite", 7), ("fsync", 0), ("fsync", 4)])
def test_full_disk_keeps_the_old_weights_and_leaves_nothing_else(tmp_path, tensors, monkeypatch, call, after):
    save_sharded(tmp_path, tensors, whole(tensors), max_shard_bytes=20)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real, calls = getattr(os, call), []

    def full(*args):
        calls.append(args)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, call, full)
    other = {name: array + array for name, array in tensors.items()}
    with pytest.raises(UserError, match="cannot write .*No space left on device; free space") as caught:
        save_sharded(tmp_path, other, whole(other), max_shard_bytes=20)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_too_little_space_is_told_before_anything_is_written(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 100))
    with pytest.raises(UserError, match="it takes 0.0 GiB and 0.0 are free"):
        save_sharded(tmp_path / "new", tensors, [])
    assert not (tmp_path / "new").exists()


WRITER = """
import os, resource, signal, sys
import numpy as np
from scaling_perception.interop.sharded import save_sharded
from scaling_perception.support.errors import UserError
tensors = {str(i): np.ones((64, 1024), np.float32) for i in range(4)}
whole = [(name, (), array) for name, array in tensors.items()]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))  # fails in the kernel, as a full disk does
try:
    save_sharded(sys.argv[1], tensors, whole, max_shard_bytes=600_000)
except UserError as error:
    print(error, os.listdir(sys.argv[1]), flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
def die(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
save_sharded(sys.argv[1], tensors, whole, max_shard_bytes=600_000, progress=die)
"""


def test_refused_or_killed_writer_leaves_nothing_that_looks_like_weights(tmp_path):
    words = [sys.executable, "-c", WRITER, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("cannot write") and done.stdout.count("\n") == 1
    assert "too large" in done.stdout and done.stdout.endswith("[]\n")
    assert done.returncode == -9
    assert names_in(tmp_path) and all(name.startswith(".") for name in names_in(tmp_path))
    assert find_weights(tmp_path) is None


def test_incomplete_and_mixed_sets_are_told(tmp_path, tensors):
    save_sharded(tmp_path, tensors, whole(tensors), max_shard_bytes=250)
    first, second = tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors"
    kept = {path: path.read_bytes() for path in (first, second, tmp_path / INDEX)}

    def refused(words):
        with pytest.raises(UserError, match=words) as caught:
            load_sharded(tmp_path)
        assert "\n" not in str(caught.value)
        for path, content in kept.items():
            path.write_bytes(content)

    second.unlink()
    refused(r"00002-of-00002.safetensors is missing, and model.safetensors.index.json needs it")
    second.write_bytes(kept[second][:-5])
    refused("00002-of-00002.safetensors is no whole safetensors file")
    save_file({"foreign": np.zeros(2, np.float32)}, second)
    refused("holds foreign, which model.safetensors.index.json does not say")
    index = json.loads(kept[tmp_path / INDEX])
    index["weight_map"] = {**index["weight_map"], "more": first.name}
    (tmp_path / INDEX).write_text(json.dumps(index))
    refused("does not hold more, as model.safetensors.index.json says")
    for table in ({"a": "../elsewhere.safetensors"}, {"a": "a.pt"}, {"a": 3}, {}, []):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": table}))
        refused("names the file|has no 'weight_map'")
    (tmp_path / INDEX).write_text("<html>")
    refused("not valid JSON")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    rng = np.random.default_rng(0)
    flat = {
        name: rng.standard_normal(leaf.shape).astype(np.float32)
        for name, leaf in flatten_tree(abstract_params(MOE)).items()
    }
    folder = tmp_path_factory.mktemp("moe")
    save_sharded(folder, flat, whole(flat), max_shard_bytes=100_000)
    return folder, flat


@pytest.mark.parametrize(
    "axes, parts", [({"data": 1, "fsdp": 8}, 8), ({"data": 1, "fsdp": 2, "expert": 4}, 8), ({"expert": 4}, 4)]
)
def test_each_device_reads_its_own_part_alone(saved, monkeypatch, axes, parts):
    folder, flat = saved
    mesh = make_mesh(**axes)
    shardings = tree_shardings(abstract_params(MOE), mesh)
    asked, real = {name: [] for name in flat}, sharded._read_slice

    def counted(source, name, index, dtype):
        asked[name].append(real(source, name, index, dtype))
        return asked[name][-1]

    monkeypatch.setattr(sharded, "_read_slice", counted)
    found = flatten_tree(load_sharded(folder, shardings))
    places = flatten_tree(shardings)
    split = [name for name, place in places.items() if not place.is_fully_replicated]
    assert "blocks/moe/experts/gate/kernel" in split
    for name, array in flat.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].sharding == places[name] and found[name].dtype == array.dtype
        own = places[name].shard_shape(array.shape)
        assert {shard.data.shape for shard in found[name].addressable_shards} == {own}
        assert {part.shape for part in asked[name]} == {own}  # never more than one device's part at once
        assert sum(part.size for part in asked[name]) == array.size  # and no part twice
    gate = places["blocks/moe/experts/gate/kernel"].shard_shape(flat["blocks/moe/experts/gate/kernel"].shape)
    assert np.prod(gate) * parts == flat["blocks/moe/experts/gate/kernel"].size


def test_loading_can_cast_and_names_what_does_not_fit(saved, tmp_path):
    folder, flat = saved
    shardings = tree_shardings(abstract_params(MOE), make_mesh(fsdp=8, data=1))
    cast = load_sharded(folder, shardings, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(cast["label_embed"], flat["label_embed"].astype(jnp.bfloat16))
    host = load_sharded(folder)
    assert all(isinstance(leaf, np.ndarray) and leaf.flags.owndata for leaf in jax.tree.leaves(host))
    fewer = unflatten_tree({name: leaf for name, leaf in flatten_tree(shardings).items() if name != "pos_embed"})
    with pytest.raises(UserError, match="tensor pos_embed is unknown to this model"):
        load_sharded(folder, fewer)
    with pytest.raises(UserError, match="tensor extra is missing"):
        load_sharded(folder, {**shardings, "extra": shardings["pos_embed"]})
    numbers = {"count": np.arange(3), "x": np.ones(3, np.float32)}
    save_sharded(tmp_path, numbers, whole(numbers))
    assert load_sharded(tmp_path, dtype=np.float16)["count"].dtype == np.int64


CONVERT = """
import re, sys
import numpy as np
from scaling_perception.interop.sharded import open_sharded, save_sharded
from scaling_perception.interop.torch_dit import config_from_shapes, leaf_specs, stream_from_torch, stream_to_torch
def kilobytes(field):  # of this program alone: getrusage would count what the process held before it started it
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
source = open_sharded(sys.argv[1])
config = config_from_shapes(source.shapes)
ours = leaf_specs(source, config)
before = kilobytes("VmRSS")
save_sharded(sys.argv[2], ours, stream_from_torch(source, config), max_shard_bytes=2**26)
ours = open_sharded(sys.argv[2])
back = ((name, (), array) for name, array in stream_to_torch(ours, config))
specs = {name: np.broadcast_to(np.float32(0), shape) for name, shape in source.shapes.items()}
save_sharded(sys.argv[3], specs, back, max_shard_bytes=2**26)
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's record of peak memory")
def test_conversion_holds_little_more_than_one_tensor(tmp_path):
    from scaling_perception.interop.torch_dit import leaf_pieces

    config = DiTConfig("wide", 8, dim=256, depth=4, heads=16, experts=8, expert_mlp="swiglu", num_classes=10)
    noise = np.random.default_rng(0).standard_normal(10**6).astype(np.float32)
    state = {}
    for plan in leaf_pieces(config).values():
        for number, piece in enumerate(plan.pieces):
            state[piece.tensor] = np.resize(noise[number:], piece.shape)
    published, ours, back = tmp_path / "published", tmp_path / "ours", tmp_path / "back"
    save_sharded(published, state, whole(state))
    size = (published / "model.safetensors").stat().st_size
    words = [sys.executable, "-c", CONVERT, str(published), str(ours), str(back)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    print(f"{size / 2**20:.0f} MiB of weights took {int(done.stdout) / 2**20:.0f} MiB of memory")
    assert size > 100 * 2**20 and int(done.stdout) < size / 8
    same(open_sharded(back), state)
    for path in (published, ours, back):
        shutil.rmtree(path)
