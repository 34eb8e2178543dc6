"""Output that nobody reads ends no command; output that cannot be written does."""

import os
import subprocess
import sys

import pytest

from scaling_perception.cli import main
from scaling_perception.support.streams import print_message

_TALK = """
import sys
from scaling_perception.support.streams import keep_standard_streams
keep_standard_streams()
for _ in range(3):
    print("·" * 40000, flush=True)
    print("progress", file=sys.stderr)
open(sys.argv[1], "w").write("done")
"""


def talk(path, shell):
    """Run the lines above below a shell that does something to their streams; returns (exit code, stderr)."""
    words = f'"{sys.executable}" -c "$0" "$1"'
    done = subprocess.run(
        ["bash", "-c", shell.replace("TALK", words), _TALK, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "shell",
    [
        "TALK | true; exit ${PIPESTATUS[0]}",
        "TALK 2>&1 | head -c 5 >/dev/null; exit ${PIPESTATUS[0]}",
        "TALK >&- 2>&-",
        "TALK <&- >&-",
        "TALK 2>/dev/full >/dev/null",
        "PYTHONIOENCODING=ascii TALK",
    ],
)
def test_the_command_goes_on_to_its_end(tmp_path, shell):
    assert talk(tmp_path / "result", shell)[0] == 0
    assert (tmp_path / "result").read_text() == "done", "what was printed went into the file"


def test_a_full_disk_below_standard_output_is_an_error(tmp_path):
    code, told = talk(tmp_path / "result", "TALK >/dev/full")
    assert code == 1 and "No space left on device: 'standard output'" in told and not (tmp_path / "result").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x9b1m \x7f", "\\x9b1m \\x7f"),
        ("a\u2028b\u202egnp.a", "a\\u2028b\\u202egnp.a"),
        ("2 × ‘é’ …  🧑‍🚀\\n", "2 × ‘é’ …  🧑‍🚀\\n"),
    ],
)
def test_control_characters_of_names_are_escaped(text, line, capsys):
    print_message(f"failed: {text}")
    assert capsys.readouterr().err == f"failed: {line}\n"


def test_a_refusal_is_one_line_whatever_the_name(tmp_path, capsys):
    name = str(tmp_path / "a\n\x1b]2Jb.png")
    assert main(["predict", "--task", "depth", "--out", str(tmp_path / "out"), name]) == 2
    assert (text := capsys.readouterr().err).count("\n") == 1 and "a\\n\\x1b]2Jb.png does not exist" in text
