"""Trees in safetensors files: exact bytes back, and no partial file whatever goes wrong."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_perception.interop.safetensors_io import (
    cast,
    flatten_tree,
    read_entries,
    save_tree,
    source_of,
    source_of_entries,
    unflatten_tree,
)
from scaling_perception.support.errors import UserError


def test_every_dtype_and_shape_comes_back(tmp_path):
    tree = {
        "a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T, "bias": jnp.ones(3, jnp.bfloat16)},
        "count": np.array(7, np.int32),
        "half": np.array([[1.5]], np.float16),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_tree(tmp_path / "x.safetensors", tree, {"made": "by hand"})
    entries, metadata = read_entries(tmp_path / "x.safetensors")
    source = source_of_entries(entries, "x", metadata)
    back = unflatten_tree({name: source.read(name) for name in source.shapes})
    assert metadata == {"made": "by hand"}
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        assert isinstance(theirs, np.ndarray) and theirs.dtype == ours.dtype
        np.testing.assert_array_equal(np.asarray(ours), theirs)


def test_names_that_make_no_tree_are_refused():
    assert unflatten_tree(flatten_tree({"a": {"b": 1, "c": {"d": 2}}})) == {"a": {"b": 1, "c": {"d": 2}}}
    with pytest.raises(ValueError, match="without '/'"):
        flatten_tree({"a/b": 1})
    with pytest.raises(ValueError, match="empty"):
        flatten_tree({"a": {}})
    for names in (["a", "a/b"], ["a/b", "a"]):
        with pytest.raises(ValueError, match="tensor"):
            unflatten_tree(dict.fromkeys(names, 1))


@pytest.mark.parametrize("keep", [0, 4, 60, 400])
def test_truncated_file_is_told(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_tree(path, {"a": np.ones((10, 10), np.float32)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="x.safetensors is (no whole safetensors file|empty)"):
        read_entries(path)


def test_missing_file_and_foreign_file_are_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_entries(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_text("not tensors at all, but long enough to look like something")
    with pytest.raises(UserError, match="no whole safetensors file"):
        read_entries(tmp_path / "y.safetensors")


def test_a_tensor_is_mapped_from_the_file_and_read_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    tree = {"a": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4)}, "b": np.ones(3, jnp.bfloat16)}
    save_tree(path, {**tree, "none": np.zeros((0, 2), np.int8)}, {"made": "by hand"})
    entries, metadata = read_entries(path)
    source = source_of_entries(entries, "x", metadata)
    assert source.shapes == {"a/kernel": (3, 4), "b": (3,), "none": (0, 2)} and source.metadata == {"made": "by hand"}
    assert source.dtypes["b"] == jnp.bfloat16 and source.read("none").shape == (0, 2)
    kernel = source.read("a/kernel")
    assert isinstance(kernel, np.memmap) and not kernel.flags.writeable
    np.testing.assert_array_equal(kernel[1:, 2], tree["a"]["kernel"][1:, 2])
    memory = source_of(flatten_tree(tree), "memory")
    assert memory.dtypes == {"a/kernel": np.float32, "b": jnp.bfloat16} and memory.read("b") is tree["b"]


def test_what_is_no_tensor_file_is_told_by_what_it_is(tmp_path):
    path = tmp_path / "x.safetensors"
    for content, words in (
        (b"", "is empty: download it again"),
        (b"<html><head><title>404</title>", "is a web page, not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "only a Git LFS pointer"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_entries(path)
    header = b'{"a":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UserError, match="tensor a has dtype F8_E8M0, which numpy lacks"):
        read_entries(path)


def test_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tree(path, {"a": np.zeros(3, np.float32)})
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_tree(path, {"a": np.ones(3, np.float32)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]


def test_writer_that_runs_out_of_space_is_told_and_leaves_nothing(tmp_path):
    # a limit on file size, in a process of its own, fails inside the library's writer as a full disk does
    code = """
import resource, signal, sys
import numpy as np
from scaling_perception.interop.safetensors_io import save_tree
from scaling_perception.support.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_tree(sys.argv[1], {"a": np.ones((512, 512), np.float32)})
except UserError as error:
    print(error)
"""
    words = [sys.executable, "-c", code, str(tmp_path / "x.safetensors")]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cannot write") and "too large" in done.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_cast_keeps_what_fits(dtype):
    values = np.array([[0.5, -1.0], [448.0, 0.0]], np.float32)
    array = cast("a/b", values, np.dtype(dtype))
    assert array.dtype == np.dtype(dtype) and np.array_equal(array.astype(np.float32), values)
    assert cast("a", np.float32(2), np.dtype(dtype)).shape == () and cast("a", np.arange(3), np.int8).dtype == np.int8


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (-1e6, "float16", "tensor a/b does not fit float16, for its largest value is 1e+06: use bfloat16"),
        (1e6, "float8_e5m2", "tensor a/b does not fit float8_e5m2, for its largest value is 1e+06: use float32"),
        (3.4e38, "bfloat16", "tensor a/b does not fit bfloat16, for its largest value is 3.4e+38: use float32"),
        (np.nan, "float32", "tensor a/b holds 1 value(s) that are NaN or infinite"),
        (-np.inf, "float16", "tensor a/b holds 1 value(s) that are NaN or infinite"),
    ],
)
def test_cast_refuses_what_is_not_finite_then(value, dtype, told):
    with pytest.raises(UserError, match=re.escape(told)):
        cast("a/b", np.array([1, value, 2], np.float32), np.dtype(dtype))
