"""Files are whole or absent, whatever goes wrong while they are written."""

import errno
import os
import stat

import numpy as np
import pytest

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.files import atomic_path, read_json, save_npy, write_json, write_text


def test_written_whole_with_ordinary_rights(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"x": [1, 2.5, None]})
    assert read_json(tmp_path / "deep" / "a.json") == {"x": [1, 2.5, None]}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "deep" / "a.json").stat().st_mode) == 0o666 & ~umask
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.json"]


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        assert temporary.suffix == ".txt" and (tmp_path / "a.txt").read_text() == "old"
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "free space"), (errno.EDQUOT, "free space"), (errno.EACCES, "ask for the perm")]
)
def test_what_the_disk_refuses_is_one_line(tmp_path, code, words):
    with pytest.raises(UserError, match=f"a.txt: .*{words}") as caught, atomic_path(tmp_path / "a.txt"):
        raise OSError(code, os.strerror(code))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_other_failures_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(OSError) as caught, atomic_path(tmp_path / "a.txt"):
        raise OSError(errno.EPIPE, "pipe")
    assert not isinstance(caught.value, UserError)


def test_links_are_followed_and_other_things_refused(tmp_path):
    write_text(tmp_path / "real.txt", "old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(UserError, match="no regular file"):
            write_text(tmp_path / name, "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_json_refuses_nan_and_explains_broken_files(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"x": ')
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "a.json")


def test_suggestions_name_the_nearest_and_all():
    assert did_you_mean("dept", ["depth", "flow"]) == "; did you mean 'depth'? known: depth, flow"
    assert did_you_mean("zzz", ["depth", "flow"]) == "; known: depth, flow"


@pytest.mark.parametrize("array", [np.ones((3, 4), np.float32).T, np.zeros((0, 4), np.float16), np.array(3.0)])
def test_npy_files_are_numpys_and_a_full_disk_is_called_full(tmp_path, array):
    save_npy(tmp_path / "a.npy", array)
    np.save(tmp_path / "b.npy", np.ascontiguousarray(array) if array.ndim else array)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    with pytest.raises(OSError, match="No space left") as error:
        save_npy("/dev/full", array)
    assert error.value.errno == errno.ENOSPC
