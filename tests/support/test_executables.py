"""Kept executables: found again, never stale, and no reason to fail."""

import errno
import os
import threading

import jax
import numpy as np
import pytest

from scaling_perception.inference.predictor import Predictor
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.support import executables
from scaling_perception.support.compilation import EXECUTABLES
from scaling_perception.support.executables import kept_executable, kept_value

pytest_plugins = ("nano",)

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(EXECUTABLES, str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def built():
    return []


@pytest.fixture
def get(built):
    def get(about="sine", argument=X, devices=None):
        def build():
            built.append(about)
            return jax.jit(lambda x: jax.numpy.sin(x) @ x.T).lower(argument).compile()

        return kept_executable(about, (argument,), devices or jax.devices()[:1], build)

    return get


def test_found_again_with_the_same_bytes(folder, get, built):
    first, second = get()(X), get()(X)
    assert built == ["sine"] and len(list(folder.iterdir())) == 1
    assert np.asarray(first).tobytes() == np.asarray(second).tobytes()


CHANGES = {
    "source": lambda patch: patch.setattr(executables, "source_digest", lambda: "another"),
    "jaxlib": lambda patch: patch.setattr(executables, "package_version", lambda name: f"{name} 99"),
    "processor": lambda patch: patch.setattr(executables, "processor", lambda: "another"),
    "variable": lambda patch: patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=false"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_anything_else_is_another_program(folder, get, built, monkeypatch, what):
    get()
    CHANGES[what](monkeypatch)
    get()
    assert built == ["sine"] * 2
    monkeypatch.undo()
    monkeypatch.setenv(EXECUTABLES, str(folder))
    get()
    assert built == ["sine"] * 2, "the first is still there"


def test_settings_shapes_dtypes_and_devices_are_other_programs(folder, get, built):
    get()
    with jax.default_matmul_precision("highest"):
        get()
    get("cosine")
    get(argument=X[:1])
    get(argument=X.astype(np.int32))
    get(argument=jax.ShapeDtypeStruct((2, 3), np.float16))
    get(devices=jax.devices()[1:2])  # compiled for the first, but so it is said
    assert len(built) == len(list(folder.iterdir())) == 7


def test_the_source_digest_is_of_every_file(monkeypatch, tmp_path):
    place = tmp_path / "package" / "support"
    place.mkdir(parents=True)
    monkeypatch.setattr(executables, "__file__", str(place / "executables.py"))
    found = []
    for name, text in (("support/a.py", "1"), ("support/a.py", "2"), ("b.py", "2"), ("support/c.py", "")):
        (tmp_path / "package" / name).write_text(text)
        executables.source_digest.cache_clear()
        found.append(executables.source_digest())
    (tmp_path / "package" / "b.py").rename(tmp_path / "package" / "d.py")
    executables.source_digest.cache_clear()
    found.append(executables.source_digest())
    executables.source_digest.cache_clear()
    assert len(set(found)) == 5


def _flip(data):
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], _flip, lambda data: b"\n"])
def test_a_damaged_file_is_made_again(folder, get, built, damage):
    expected = np.asarray(get()(X))
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match=f"{file.name} is damaged and is made again: its checksum"):
        np.testing.assert_array_equal(get()(X), expected)
    get()
    assert len(built) == 2


def test_a_file_of_another_program_or_an_unknown_form_is_made_again(folder, get, built):
    get()
    (file,) = folder.iterdir()
    content = file.read_bytes()
    get("cosine")
    (other,) = set(folder.iterdir()) - {file}
    other.write_bytes(content)
    with pytest.warns(UserWarning, match="another program"):
        get("cosine")
    text = content.partition(b"\n")[2].partition(b"\0")[0].decode()
    executables._write(file, text, b"no pickle")
    with pytest.warns(UserWarning, match="damaged"):
        get()
    get()
    assert built == ["sine", "cosine", "cosine", "sine"]


def test_a_folder_that_cannot_be_written_is_no_failure(folder, get, built, monkeypatch):
    folder.write_text("a file")
    with pytest.warns(UserWarning, match="executables are not kept: .*kept"):
        assert get()(X).shape == (2, 2)
    folder.unlink()

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(executables, "atomic_path", full)
    with pytest.warns(UserWarning, match="executables are not kept: .*No space left"):
        assert get()(X).shape == (2, 2)


def test_nothing_is_kept_where_it_is_off_or_cannot_be_described(folder, get, monkeypatch, built):
    get(None)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        get()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    get(argument=jax.device_put(X, jax.devices()[1]))  # takes the program to its device
    monkeypatch.setenv(EXECUTABLES, "")
    get()
    assert kept_value("one", lambda: 1) == 1
    assert len(built) == 4 and not folder.exists()


def test_several_write_at_once(folder):
    together, found = threading.Barrier(6), []

    def build():
        together.wait()
        return {"a": [1, 2]}

    threads = [threading.Thread(target=lambda: found.append(kept_value("one", build))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{"a": [1, 2]}] * 6
    assert kept_value("one", lambda: None) == {"a": [1, 2]} and len(list(folder.iterdir())) == 1


def test_what_jax_read_from_its_own_cache_is_compiled_again(folder, get, tmp_path):
    """Written once more, such an executable would lack functions and fail when it runs."""
    limit, place = jax.config.jax_persistent_cache_min_compile_time_secs, jax.config.jax_compilation_cache_dir
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    executables.reset_cache()
    try:
        for enabled in (True, False):  # JAX has a cache by now, and writes to it in both cases, under different names
            jax.config.update("jax_enable_compilation_cache", enabled)
            expected = np.asarray(jax.jit(lambda x: jax.numpy.sin(x) @ x.T).lower(X).compile()(X))
        jax.config.update("jax_enable_compilation_cache", True)
        assert list((tmp_path / "jax").glob("*-cache"))
        executables._count_hits()
        hits = len(executables._HITS)
        np.testing.assert_array_equal(get()(X), expected)
        assert len(executables._HITS) == hits, "it was read from JAX's cache"
        np.testing.assert_array_equal(get()(X), expected)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", limit)
        jax.config.update("jax_compilation_cache_dir", place)
        executables.reset_cache()
    assert len(list(folder.iterdir())) == 1


def test_what_is_read_from_jaxs_cache_all_the_same_is_not_kept(folder):
    def build():
        executables._HITS.append("as another thread may have made JAX look")
        return jax.jit(jax.numpy.cos).lower(X).compile()

    kept_executable("cosine", (X,), jax.devices()[:1], build)
    assert not folder.exists()


def test_old_files_make_room(folder, get, monkeypatch):
    get()
    (old,) = folder.iterdir()
    os.utime(old, (1, 1))
    get("cosine")
    (middle,) = set(folder.iterdir()) - {old}
    monkeypatch.setattr(executables, "_LIMIT", 2 * middle.stat().st_size + 100)
    get("tangent")
    assert not old.exists() and middle.exists() and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("devices", [1, 2])
def test_predictions_are_the_same_bytes(folder, make_predictor, make_image, monkeypatch, devices):
    def predict(seed=0, decode=None):
        one = make_predictor(seed=seed)
        vae = one.autoencoder if decode is None else one.autoencoder.__class__(**{**vars(one.autoencoder), **decode})
        mesh = make_mesh(devices=jax.devices()[:devices]) if devices > 1 else None
        one = Predictor(one.params, one.meta, vae, mesh=mesh)
        found = one(make_image(), ensemble=2, steps=2, batch_size=2)
        return one, (found.prediction.tobytes(), found.members.tobytes())

    monkeypatch.setenv(EXECUTABLES, "")
    _, expected = predict()
    _, other = predict(seed=1)
    monkeypatch.setenv(EXECUTABLES, str(folder))
    first, found = predict()
    assert found == expected and first.traces == {"encode": 1, "sample": 1}
    again, found = predict()
    assert found == expected and not again.traces
    weights, found = predict(seed=1)
    assert found == other != expected and not weights.traces, "weights are arguments"
    # a function of the user's own may compute anything: nothing is taken from disk
    own, found = predict(decode={"decode": lambda params, z: jax.numpy.zeros((len(z), 32, 32, 3)) + z.mean()})
    assert found != expected and own.traces == {"encode": 1, "sample": 1}
