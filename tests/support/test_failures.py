"""What the machine refuses is one line, and never called damage."""

import errno
import os
import re
import subprocess
import sys

import pytest

from scaling_perception.cli import main
from scaling_perception.support.failures import explain, explain_os, is_out_of_memory, not_damage


def caused(error, cause):
    error.__cause__ = cause
    return error


MACHINE = [
    (PermissionError(errno.EACCES, "Permission denied", "/x/ledger.json"), r"/x/ledger.json: Permission denied \(/ is"),
    (OSError(errno.EMFILE, "Too many open files", "/x/a"), "/x/a: the limit of open files .* `ulimit -n"),
    (OSError(errno.EMFILE, "Too many open files"), "^the limit of open files"),
    (OSError(errno.ENOSPC, "No space left on device"), "^No space left on device; free space"),
    (OSError(errno.EROFS, "Read-only file system", "/x/a"), "/x/a: Read-only file system"),
    (MemoryError("Unable to allocate 7 GiB"), "out of memory .Unable to allocate 7 GiB"),
    (caused(RuntimeError("worker"), MemoryError()), "out of memory .MemoryError"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), "out of memory .RESOURCE_EXHAUSTED"),
]


@pytest.mark.parametrize(("error", "words"), MACHINE)
def test_the_command_line_says_it_in_one_line(error, words, monkeypatch, capsys):
    def fail(verb, rest):
        raise error

    monkeypatch.setattr("scaling_perception.cli.run_verb", fail)
    assert main(["presets"]) == 2
    told = capsys.readouterr().err.removeprefix("scaling-perception: ").strip()
    assert "\n" not in told
    assert re.search(words, told), told


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), RuntimeError("x"), FileNotFoundError(2, "no", "x")])
def test_bugs_keep_their_trace(error):
    assert explain(error) is None


OUT_OF_MEMORY = [
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.1G of 15.7G hbm.",
    "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
]


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_out_of_memory_is_known_by_its_words(text):
    assert is_out_of_memory(RuntimeError(text))


def test_a_kernels_own_memory_is_another_matter():
    assert not is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem."))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("open() failed: Too many open files; opening /x", "ulimit"),
        ("PERMISSION_DENIED: Error opening x", "permission"),
        ("Stale file handle", "run again"),
        ("checksum mismatch", None),
        ("Input/output error", None),  # a bad sector: as good as damage
    ],
)
def test_what_says_nothing_about_a_file_is_no_damage(text, words):
    found = not_damage(RuntimeError(text))
    assert found is None if words is None else words in str(found)


def test_the_owner_is_named(tmp_path):
    (tmp_path / "a").write_text("")
    os.chmod(tmp_path / "a", 0o640)
    if os.getuid() == 0:
        os.chown(tmp_path / "a", 54321, -1)
        assert "(it is of user 54321, mode 640)" in explain_os(PermissionError(13, "no", str(tmp_path / "a")))
    assert "mode 640" in explain_os(PermissionError(13, "no", str(tmp_path / "a")))


_VERB = """
import sys
from scaling_perception.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_platform_that_is_not_here(tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cuda"}
    words = ["train", "--config", "configs/mini.py:model=nano,res=32", "--workdir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", _VERB, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "JAX_PLATFORMS=cuda: no such device was found" in done.stderr and "this machine has: cpu" in done.stderr
