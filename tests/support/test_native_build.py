"""Kernels in C++ are compiled once, and are no necessity."""

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scaling_perception.support import compilation, native

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="needs a C++ compiler")
SCRIPT = """
import time, warnings
from scaling_perception.support import native
begin = time.perf_counter()
found = native.targets()
print(len(found), time.perf_counter() - begin)
if found:
    import jax, jax.numpy as jnp, numpy as np
    out = jax.ffi.ffi_call(found["attention_forward"], jax.ShapeDtypeStruct((1, 2, 1), jnp.float32))
    print(out(jnp.ones((1, 2, 3)), heads=np.int64(1)).tolist())
"""


@pytest.fixture
def fresh():
    native._registered.cache_clear()
    yield
    native._registered.cache_clear()


def in_process(folder, **variables):
    environment = {**os.environ, native.NATIVE: str(folder), **variables}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n"), done.stderr


@needs_compiler
def test_a_later_process_loads_what_the_first_compiled_and_needs_no_compiler(tmp_path):
    lines, _ = in_process(tmp_path / "kernels")
    assert lines[0].startswith("4 ") and lines[1] == "[[[1.0], [1.0]]]"
    file, digest = sorted((tmp_path / "kernels").iterdir(), reverse=True)  # nothing half written is beside them
    assert (file.suffix, digest.suffix) == (".so", ".sha256")
    made = file.stat().st_mtime_ns
    lines, errors = in_process(tmp_path / "kernels", CXX="no-such-compiler")
    assert lines[0].startswith("4 ") and lines[1] == "[[[1.0], [1.0]]]" and not errors
    assert file.stat().st_mtime_ns == made


@needs_compiler
def test_a_damaged_file_is_made_again(tmp_path):
    in_process(tmp_path)
    (file,) = tmp_path.glob("*.so")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])  # cut: loading it may succeed, and calling it end the process
    lines, errors = in_process(tmp_path)
    assert lines[1] == "[[[1.0], [1.0]]]" and not errors
    assert len(file.read_bytes()) == len(whole)


def test_a_compiler_that_fails_is_one_warning_and_nothing_is_left(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'attention.cc:1: error: this is no compiler' >&2\nexit 1\n")
    broken.chmod(0o755)
    lines, errors = in_process(tmp_path / "kernels", CXX=str(broken))
    assert lines[0].startswith("0 ")
    assert errors.count("cannot be compiled") == 1 and "this is no compiler" in errors
    assert list((tmp_path / "kernels").iterdir()) == []


@needs_compiler
def test_a_folder_that_cannot_be_made_is_reported_where_the_user_chose_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    lines, errors = in_process(tmp_path / "file" / "kernels")
    assert lines[0].startswith("0 ") and errors.count("cannot be compiled") == 1 and "file" in errors
    monkeypatch.delenv(native.NATIVE, raising=False)
    monkeypatch.setattr(native, "pays", lambda: True)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file"))
    assert native._registered.__wrapped__() == {}


@needs_compiler
def test_threads_that_ask_at_once_register_once(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv(native.NATIVE, str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: native.targets(), range(8)))
    assert found == [native.targets()] * 8 and native._registered.cache_info().misses == 1


def test_without_compiler_or_folder_there_are_none_and_no_warning(tmp_path, monkeypatch):
    for name, value in (("CXX", "no-such-compiler"), (native.NATIVE, "")):
        with monkeypatch.context() as changed, warnings.catch_warnings():
            warnings.simplefilter("error")
            changed.setenv(native.NATIVE, str(tmp_path / "empty"))
            changed.setenv(name, value)
            assert native._registered.__wrapped__() == {}


@needs_compiler
@pytest.mark.parametrize(
    ("text", "used"),
    [
        ("vendor_id : GenuineIntel\nflags : fpu avx2 avx512f avx512bw\n", True),
        ("vendor_id : GenuineIntel\nflags : fpu avx2\n", False),
        ("vendor_id : AuthenticAMD\nflags : fpu avx2 avx512f\n", False),
        ("", False),
    ],
)
def test_only_processors_on_which_it_was_measured_use_it_unasked(text, used, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "processor_text", lambda: text)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(native.NATIVE, raising=False)
    assert native.wanted() == used
    monkeypatch.setenv(native.NATIVE, str(tmp_path))
    assert native.wanted()


def test_the_folder_is_beside_the_compiled_programs(monkeypatch, tmp_path):
    monkeypatch.delenv(native.NATIVE, raising=False)
    for given, expected in (
        (str(tmp_path), tmp_path / "native"),
        ("", None),
        (
            "gs://bucket/cache",
            tmp_path / "home" / "scaling-perception" / "compiled" / compilation.processor() / "native",
        ),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", given)
        assert native.folder() == expected
    monkeypatch.setenv(native.NATIVE, "~/kernels")
    assert native.folder() == Path.home() / "kernels"
