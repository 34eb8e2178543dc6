"""Where compiled programs are kept: the user's own choice first, and never a reason to fail."""

import os
import pwd
import subprocess
import sys

import pytest

from scaling_perception.support.compilation import EXECUTABLES, keep_compiled_programs, quiet_libtpu

_CODE = """
from scaling_perception.support.compilation import keep_compiled_programs
keep_compiled_programs()
import os
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
import jax, jax.numpy as jnp
print(jax.jit(lambda x: jnp.tanh(x) @ x.T)(jnp.ones((4, 4)))[0, 0])
"""


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    kept = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", _CODE], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        kept.append({path.name for path in tmp_path.rglob("*-cache")})
    assert kept[0] and kept[0] == kept[1], "the second run compiled again"


def test_the_users_own_folder_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "mine")


@pytest.mark.parametrize("cache", ["mine", "", "gs://bucket/x"])
def test_executables_are_kept_in_the_same_folder_unless_said_otherwise(monkeypatch, tmp_path, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
    monkeypatch.delenv(EXECUTABLES)
    keep_compiled_programs()
    assert os.environ.get(EXECUTABLES) == (os.path.join("mine", "executables") if cache == "mine" else None)
    for given in ("", "elsewhere"):
        monkeypatch.setenv(EXECUTABLES, given)
        keep_compiled_programs()
        assert os.environ[EXECUTABLES] == given


def test_home_is_expanded_and_a_folder_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "~/mine")
    keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "mine")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path / "cache"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "~/file/x")
    keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert "JAX_COMPILATION_CACHE_DIR=~/file/x cannot be written" in capsys.readouterr().err


def test_without_a_home_nothing_is_kept(monkeypatch, tmp_path):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ and not list(tmp_path.iterdir())


def test_libtpu_is_quiet_unless_a_slice_is_described(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(os, "environ", {"HOME": "/"})
    quiet_libtpu()
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "localhost"
    for given in ({"TPU_WORKER_HOSTNAMES": "a,b"}, {"MEGASCALE_NUM_SLICES": "2"}):
        monkeypatch.setattr(os, "environ", dict(given))
        quiet_libtpu()
        assert os.environ == given


def test_a_folder_that_cannot_be_made_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
