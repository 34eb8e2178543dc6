"""The released generalist's size, 2.76 B parameters and 11 GB, with random weights: how much memory converting takes.

pytest -m slow tests/interop/test_full_size.py -s        # minutes; needs 36 GB of disk (TMPDIR) and torch
"""

import resource
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from scaling_perception.interop.sharded import load_sharded, open_sharded
from scaling_perception.interop.torch_dit import leaf_pieces
from scaling_perception.models.dit import abstract_params, count_params
from scaling_perception.models.presets import get_preset
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.parallel.rules import tree_shardings

pytestmark = pytest.mark.slow
GIB = 2**30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, torch):
    """A state dict of the released layout; its tensors are windows of a file, so that making it takes no memory."""
    folder = tmp_path_factory.mktemp("full")
    if shutil.disk_usage(folder).free < 36 * GIB:
        pytest.skip(f"needs 36 GB of disk: {folder} has less free; set TMPDIR")
    pieces = [piece for plan in leaf_pieces(get_preset("XL-8E2A")).values() for piece in plan.pieces]
    count = sum(int(np.prod(piece.shape)) for piece in pieces)
    assert count == count_params(get_preset("XL-8E2A")) == 2_758_511_264
    numbers = np.memmap(folder / "numbers", np.float32, "w+", shape=(count,))
    noise = np.random.default_rng(0).standard_normal(2**24, np.float32)
    for start in range(0, count, noise.size):
        part = numbers[start : start + noise.size]
        part[:] = np.roll(noise, start // noise.size)[: part.size]
    state, start = {}, 0
    for piece in pieces:
        size = int(np.prod(piece.shape))
        state[piece.tensor] = torch.from_numpy(np.asarray(numbers[start : start + size]).reshape(piece.shape))
        start += size
    torch.save(state, folder / "generalist.pt")
    (folder / "numbers").unlink()
    return folder / "generalist.pt"


def convert(*words):
    """Peak resident memory in bytes of one conversion."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run([sys.executable, "-m", "scaling_perception", "convert", *map(str, words)], text=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert done.returncode == 0 and peak > before
    return peak * 1024


@pytest.mark.timeout(3600)
def test_converting_takes_little_more_memory_than_the_file(checkpoint, tmp_path, torch):
    size = checkpoint.stat().st_size
    peak = convert(checkpoint, tmp_path / "ours", "--layout", "generalist")
    print(f"\nfile {size / 1e9:.2f} GB; peak memory of convert {peak / 1e9:.2f} GB, {peak / size:.2f} of the file")
    assert peak < 1.25 * size + 1e9

    config = get_preset("XL-8E2A")
    source = open_sharded(tmp_path / "ours")
    state = torch.load(checkpoint, weights_only=True, mmap=True)
    for leaf, plan in leaf_pieces(config).items():  # some of every leaf
        for piece in (plan.pieces[0], plan.pieces[-1]):
            ours = source.read(leaf)[piece.index]
            np.testing.assert_array_equal(piece.to_torch(ours), state[piece.tensor].numpy())

    mesh = make_mesh(fsdp=2, expert=4, data=1)
    loaded = load_sharded(tmp_path / "ours", tree_shardings(abstract_params(config), mesh))
    held = [0] * mesh.size
    for leaf in jax.tree.leaves(loaded):
        for shard in leaf.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    print(f"largest share of one of {mesh.size} devices: {max(held) / 1e9:.2f} GB")
    assert max(held) < size / 4
