#!/usr/bin/env python3
"""The longest functions and files, and circles of imports; exit code 1 where a limit is passed.

    python .ci/house.py [--top N]

A function has at most 120 lines, decorators aside, unless a comment in it begins with «Long:» and says why; a file has
at most 500. Imports of modules of the package, also those within functions, make no circle; those for the type checker
alone (`if TYPE_CHECKING:`) do not count.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "scaling_perception"
FOLDERS = (PACKAGE, "configs", "benchmarks", "tests", ".ci")
MOST_OF_A_FUNCTION, MOST_OF_A_FILE = 120, 500


def functions(source: str, tree: ast.AST) -> Iterator[tuple[int, str, int, bool]]:
    """(lines, qualified name, first line, whether a comment says why it is long) of each function."""
    comments = {at for at, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("# Long: ")}

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[int, str, int, bool]]:
        for child in _statements(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}."
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                last = child.end_lineno or child.lineno
                explained = any(child.lineno <= line <= last for line in comments)
                yield last - child.lineno + 1, name.removesuffix("."), child.lineno, explained
            yield from visit(child, name)

    yield from visit(tree, "")


def imports(trees: dict[str, ast.AST]) -> dict[str, set[str]]:
    """Module of the package -> the modules of the package that it imports, anywhere in its file.

    Args:
        trees: by path from the root of the checkout.
    """
    modules = {}
    for name, tree in trees.items():
        parts = Path(name).with_suffix("").parts
        if parts[0] == PACKAGE:
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = tree
    found: dict[str, set[str]] = {}
    for module, tree in modules.items():
        names: list[str] = []
        for node in _run(tree):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names += [name if name in modules else node.module for name in inner]
        found[module] = {name for name in names if name in modules and name != module}
    return found


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Those directly within ``node``: expressions hold neither functions with lines of their own nor imports."""
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):  # of a module, a statement, a handler or a case
        yield from getattr(node, field, ())


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """All statements within ``node`` but those below ``if TYPE_CHECKING:``."""
    for child in _statements(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in (getattr(child.test, name, "") for name in ("id", "attr")):
            continue
        yield child
        yield from _run(child)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other, each sorted (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--top", type=int, default=10, help="how many of the longest are listed")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    files, long, wrong = [], [], []
    trees: dict[str, ast.AST] = {}
    for path in sorted(path for folder in FOLDERS for path in (args.root / folder).rglob("*.py")):
        name, source = str(path.relative_to(args.root)), path.read_text(encoding="utf-8")
        trees[name] = ast.parse(source)
        files.append((len(source.splitlines()), name))
        if files[-1][0] > MOST_OF_A_FILE:
            wrong.append(f"{name} has {files[-1][0]} lines: split it, the limit is {MOST_OF_A_FILE}")
        for lines, function, first, explained in functions(source, trees[name]):
            long.append((lines, f"{name}:{first} {function}"))
            if lines > MOST_OF_A_FUNCTION and not explained:
                mend = f"split it, or say why in a comment «Long: …»; the limit is {MOST_OF_A_FUNCTION}"
                wrong.append(f"{name}:{first} {function} has {lines} lines: {mend}")
    wrong += [f"circle of imports: {', '.join(group)}" for group in circles(imports(trees))]
    for title, rows in (("functions", long), ("files", files)):
        print(f"longest {title}")
        for lines, name in sorted(rows, reverse=True)[: args.top]:
            print(f"{lines:5d}  {name}")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
