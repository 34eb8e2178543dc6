"""One writer at a time: by the kernel's lock, which a killed process lets go, or by what the file says."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading

import pytest

from scaling_perception.support import locks
from scaling_perception.support.errors import UserError
from scaling_perception.support.locks import hold

_HOLD = """
import sys
from scaling_perception.support.locks import hold
with hold(sys.argv[1], "x", "y"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "SAME_MACHINE", 0.0)
    monkeypatch.setattr(locks, "OTHER_MACHINE", 0.0)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock ``tmp_path/.lock``."""
    words = [sys.executable, "-c", _HOLD, str(tmp_path / ".lock")]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def refuse_flock(monkeypatch, code):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_the_second_is_told_who_holds_it_and_a_killed_holder_lets_go(tmp_path, holder, monkeypatch):
    words = rf"^a run is at work \(process {holder.pid} on .+, since \d{{4}}-.+\): wait$"
    with pytest.raises(UserError, match=words), hold(tmp_path / ".lock", "a run is at work", "wait"):
        pass
    holder.kill()
    monkeypatch.setattr(locks, "SAME_MACHINE", 10.0)  # the kernel may need a moment
    with hold(tmp_path / ".lock", "a run is at work", "wait"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()


def test_a_holder_on_another_machine_is_waited_for_longer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "OTHER_MACHINE", 0.3)
    with hold(tmp_path / ".lock", "", ""):
        (tmp_path / ".lock").write_text('{"host": "elsewhere", "pid": 1, "since": "then"}')
        with pytest.raises(UserError, match="process 1 on elsewhere, since then"), hold(tmp_path / ".lock", "busy", ""):
            pass
    assert "busy (process 1 on elsewhere, since then); waiting up to 0 s" in capsys.readouterr().err


def test_those_who_wait_come_one_after_the_other(tmp_path):
    inside, most = [], []

    def work():
        with hold(tmp_path / "deep" / ".lock", "", "", wait=True):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_goes_on(tmp_path, monkeypatch, capsys, code):
    refuse_flock(monkeypatch, code)
    gone = {"host": os.uname().nodename, "pid": 999_999_999, "started": "1"}
    (tmp_path / ".lock").write_text(json.dumps(gone))
    with hold(tmp_path / ".lock", "busy", ""):
        assert "this file system has no locks" in capsys.readouterr().err


def test_without_locks_a_living_holder_of_this_machine_is_respected(tmp_path, holder, monkeypatch):
    refuse_flock(monkeypatch, errno.ENOSYS)
    with pytest.raises(UserError, match=f"busy .process {holder.pid} on"), hold(tmp_path / ".lock", "busy", ""):
        pass


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file.*: "), hold(tmp_path / "file" / ".lock", "", ""):
        pass
