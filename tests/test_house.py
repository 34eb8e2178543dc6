"""The house rules: style, types, import direction, file size, nothing machine-bound in the tree."""

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _tool(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if not found:
        pytest.fail(f"{name} is not installed: pip install -e '.[test]'")
    return found


def _run(*words: str) -> None:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"


def _tracked(*patterns: str) -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: else the list of tracked files is unknown")
    listed = subprocess.run(["git", "ls-files", "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_ruff():
    _run(_tool("ruff"), "check", ".")


@pytest.mark.slow  # a minute of one core; .ci/run asks the same after the README's command
def test_types():
    _run(_tool("basedpyright"), "--pythonpath", sys.executable, "--level", "error")


def test_what_needs_pytorch_carries_the_marker():
    """A test that skips itself without the marker would run nowhere: the README's command has no PyTorch."""
    here = Path(__file__)
    skipping = re.compile(r"""importorskip\(["'](torch|diffusers)|^(import|from) torch\b""", re.M)
    for path in set(_tracked("tests/*.py")) - {here, here.parent / "conftest.py"}:
        text = path.read_text()
        for found in skipping.finditer(text):
            asks = re.search(r"^pytestmark = pytest.mark.torch|\(.*\btorch\b.*\):$", text[: found.start()], re.M)
            assert asks, f"{path}: use the fixture torch, or mark the file"


def test_imports_go_one_way():
    _run(_tool("lint-imports"))


def _house(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / ".ci" / "house.py"), *words], capture_output=True, text=True)


def test_no_long_function_no_long_file_and_no_circle():
    done = _house()
    assert done.returncode == 0, done.stderr
    assert "longest functions\n" in done.stdout and "longest files\n" in done.stdout


def test_what_is_too_long_or_a_circle_is_named(tmp_path):
    package = tmp_path / "scaling_perception"
    package.mkdir()
    body = "    x = 1\n" * 120
    (package / "a.py").write_text(f"def long():\n{body}\n\ndef told():\n    # Long: a table.\n{body}")
    (package / "b.py").write_text("def f():\n    from scaling_perception.c import g\n" + "\n" * 500)
    (package / "c.py").write_text("from scaling_perception import b\n")
    (package / "d.py").write_text("if TYPE_CHECKING:\n    import scaling_perception.e\n")
    (package / "e.py").write_text("import scaling_perception.d\n")
    done = _house("--root", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "scaling_perception/a.py:1 long has 121 lines: split it, or say why in a comment «Long: …»; the limit is 120",
        "scaling_perception/b.py has 502 lines: split it, the limit is 500",
        "circle of imports: scaling_perception.b, scaling_perception.c",
    ]


def test_no_machine_paths_and_no_heavy_files():
    bound = re.compile(r"(?<![\w.])/(?:work|root|home/\w+)/\w")
    for path in _tracked("*.py", "*.md", "*.toml", "*.sh", "*.yaml", "*.json"):
        if path != Path(__file__):
            assert not bound.search(path.read_text()), f"{path} names a path of one machine"
    for path in _tracked():
        assert path.stat().st_size < 5 * 2**20, f"{path} is over 5 MiB"


def test_cited_facts_are_on_their_page():
    """«facts 4.2» names a heading of docs/facts.md, and «facts 10, row 8» a row of its last table."""
    page = (ROOT / "docs" / "facts.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^#+ (\d+(?:\.\d+)?)\.? ", page, re.M))
    rows = set(re.findall(r"^\| (\d+) \|", page[page.index("\n## 10.") :], re.M))
    number, missing = r"\d+(?:\.\d+)?", []
    for path in _tracked("*.py", "*.md", "*.ipynb"):
        if path.name == "facts.md":
            continue
        text = path.read_text(encoding="utf-8")
        for found in re.finditer(rf"\bfacts ({number}(?:(?:, | and ){number})*)((?:, row \d+)?)", text):
            cited = set(re.findall(number, found[1])) - headings
            cited |= set(re.findall(r"row (\d+)", found[2])) - rows
            missing += [f"{path.relative_to(ROOT)}: {found[0]}"] if cited else []
    assert not missing


def test_nothing_outside_tasks_compares_a_tasks_name():
    """What differs between tasks is a field of ``tasks.base.Task``: no branch on a name, no table by names."""
    from scaling_perception.tasks import ALL_PASSES, TASKS

    names = {*TASKS, *(one.name for one in ALL_PASSES)}
    asks = re.compile(r"\b(task|tasks|pass_name|pass)\b")
    found = []
    for path in _tracked("scaling_perception/*.py"):
        if "tasks" in path.parent.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                words = {one.value for side in sides for one in ast.walk(side) if isinstance(one, ast.Constant)}
                plain = [ast.unparse(side) for side in sides if not isinstance(side, ast.Constant)]
                if words & names and any(asks.search(side) for side in plain):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
            elif isinstance(node, ast.Dict):
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                if len(keys & TASKS.keys()) > 1 and keys <= names:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: a table by tasks")
    # labels of the published generalist, kinds of drawn pictures, and fields of files, which are called like tasks
    allowed = tuple(
        f"scaling_perception/{p}" for p in ("interop/released.py", "data/sources/textures.py", "data/formats.py")
    )
    assert [line for line in found if not line.startswith(allowed)] == []
