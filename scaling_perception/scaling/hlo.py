"""What XLA made of a program, read from its text: instructions, and loops and how often they run.

XLA's own cost analysis counts the body of a loop once, so a model whose layers are scanned looks as many times cheaper
as it has layers. Here every instruction is counted as often as the loops around it run. The text is that of
``jax.stages.Compiled.as_text()``: after partitioning and fusion, one device's part, for CPU, GPU or TPU.
"""

import math
import re
from typing import Any, NamedTuple

from scaling_perception.models.exchange import OVERFLOW

_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s.*\{$")
_LINE = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")


class Array(NamedTuple):
    """One array of a value's type. ``space``: 0 is the device's main memory, others lie on the chip."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int((re.findall(r"\d+", self.dtype) or ["0"])[0])
        return (self.size * bits + 7) // 8


class Instruction(NamedTuple):
    """One line: ``arrays`` is its type, flattened; ``inside`` the text between the parentheses, ``rest`` after them."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    rest: str
    root: bool

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced program, such as ``jit(step)/jvp(DiT)/while/body/…``."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""

    def named(self, attribute: str) -> str:
        """The computation that ``attribute=%name`` says, or an empty string."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else ""


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """A compiled program; ``partitions``: devices that it runs on."""

    computations: dict[str, Computation]
    entry: str
    partitions: int


class Loop(NamedTuple):
    """A loop: its name, where it comes from, and its iterations (1 with ``known`` False if they could not be read)."""

    name: str
    op_name: str
    trips: int
    known: bool


class Place(NamedTuple):
    """A computation that runs, within ``loops``, outermost first; ``fused``: its values never reach memory."""

    computation: str
    loops: tuple[Loop, ...]
    fused: bool

    @property
    def trips(self) -> int:
        return math.prod(loop.trips for loop in self.loops)


# --- Parsing -------------------------------------------------------------------------------------------------------


def parse(text: str) -> Module:
    """The module of an HLO text.

    Raises:
        ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    partitions = re.search(r"num_partitions=(\d+)", text[:200_000])
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header and not line.startswith((" ", "HloModule")):
                current = computations.setdefault(header.group(2), {})
                entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        else:
            instruction = _instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is no HLO text: it has no ENTRY computation")
    return Module(computations, entry, int(partitions.group(1)) if partitions else 1)


def _balanced(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` is closed."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    return len(text) - 1


def _instruction(line: str) -> Instruction | None:
    found = _LINE.match(line)
    if not found:
        return None
    root, name, rest = found.groups()
    end = _balanced(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        return None
    close = _balanced(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close]
    arrays = tuple(_array(*match) for match in _ARRAY.findall(rest[:end]))
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode.group(1), arrays, operands, inside, rest[close + 1 :], bool(root))


def _array(dtype: str, dims: str, layout: str) -> Array:
    space = re.search(r"S\((\d+)\)", layout)
    shape = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
    return Array(dtype, shape, int(space.group(1)) if space else 0)


def root_of(computation: Computation) -> Instruction:
    """The instruction whose value the computation returns."""
    return next((one for one in computation.values() if one.root), list(computation.values())[-1])


def arrays_of(computation: Computation, name: str) -> tuple[Array, ...]:
    """The type of the value ``name`` of a computation; nothing, if it is not one of its values."""
    return computation[name].arrays if name in computation else ()


def numbers(text: str) -> list[int]:
    """``1,0,2`` as numbers."""
    return [int(number) for number in text.split(",") if number]


# --- Loops ---------------------------------------------------------------------------------------------------------


def places(module: Module) -> list[Place]:
    """Every computation that runs, as often as it is called from different places. Left out are conditions, reducers,
    and loops that do not run if experts have equally many rows (``models.exchange.OVERFLOW``)."""
    found: list[Place] = []

    def visit(name: str, loops: tuple[Loop, ...], above: tuple[tuple[str, Instruction], ...], fused: bool) -> None:
        if name not in module.computations:
            return
        found.append(Place(name, loops, fused))
        for one in module.computations[name].values():
            if one.opcode == "while":
                if OVERFLOW in one.op_name:
                    continue
                trips = _trips(module, name, one, above)
                loop = Loop(one.name, one.op_name, 1 if trips is None else trips, trips is not None)
                visit(one.named("body"), (*loops, loop), (*above, (name, one)), fused)
            elif one.opcode == "fusion":
                visit(one.named("calls"), loops, above, True)
            elif one.opcode in ("call", "async-start"):
                visit(one.named("to_apply") or one.named("calls"), loops, above, fused)
            elif one.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
                names = re.findall(r"[\w.\-]+", branches.group(1)) if branches else []
                for branch in names or [one.named("true_computation"), one.named("false_computation")]:
                    visit(branch, loops, above, fused)

    visit(module.entry, (), (), False)
    return found


def _trips(module: Module, parent: str, loop: Instruction, above: tuple[tuple[str, Instruction], ...]) -> int | None:
    """Iterations of a ``while`` in ``parent``; ``above``: the loops around it with the computations they stand in."""
    told = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.rest)
    if told:
        return int(told.group(1))
    inside = (*above, (parent, loop))
    compare, sides = _compare(module, loop.named("condition"))
    if compare is None:
        return None
    direction = re.search(r"direction=(\w+)", compare.rest)
    bounds = [_constant(module, side, inside) for side in sides]
    counters = [index for index, side in enumerate(sides) if side[0] == "element" and bounds[index] is None]
    if direction is None or len(counters) != 1 or bounds[1 - counters[0]] is None:
        return None
    counter, bound = sides[counters[0]][1], int(bounds[1 - counters[0]] or 0)
    start = _constant(module, _initial(module, parent, loop, counter), above)
    step = _step(module, loop.named("body"), counter)
    if start is None or step is None:
        return None
    word = (
        direction.group(1)
        if counters[0] == 0
        else {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction.group(1), direction.group(1))
    )
    distance = {"LT": bound - start, "LE": bound - start + step, "GT": bound - start, "GE": bound - start + step}
    distance["NE"] = bound - start
    return max(0, math.ceil(distance[word] / step)) if word in distance else None


# A scalar is ("value", n), ("element", i) of the loop's state, ("other", …), or the parameter i of a fusion.
_Scalar = tuple[str, Any]


def _scalar(module: Module, computation: str, name: str, bound: tuple[_Scalar, ...] | None = None) -> _Scalar:
    """What a scalar of a loop's body or condition is; ``bound``: the operands, where the computation is fused."""
    one = module.computations[computation].get(name)
    if one is None:
        return ("other", name)
    if one.opcode == "constant":
        digits = one.inside.strip()
        return ("value", int(digits)) if re.fullmatch(r"-?\d+", digits) else ("other", name)
    if one.opcode == "parameter" and bound is not None:
        return bound[int(one.inside)]
    if one.opcode == "get-tuple-element":
        source = module.computations[computation].get(one.operands[0])
        index = re.search(r"index=(\d+)", one.rest)
        if source is not None and source.opcode == "parameter" and index:
            return ("element", int(index.group(1)))
        return ("other", name)
    if one.opcode in ("copy", "bitcast", "convert", "reshape") and one.operands:
        return _scalar(module, computation, one.operands[0], bound)
    if one.opcode == "fusion":
        inner = one.named("calls")
        given = tuple(_scalar(module, computation, operand, bound) for operand in one.operands)
        return _scalar(module, inner, root_of(module.computations[inner]).name, given)
    if one.opcode == "add" and len(one.operands) == 2:
        return ("sum", tuple(_scalar(module, computation, operand, bound) for operand in one.operands))
    return ("other", name)


def _compare(module: Module, condition: str) -> tuple[Instruction | None, tuple[_Scalar, ...]]:
    """The comparison that a loop's condition returns, and its two sides."""
    if condition not in module.computations:
        return None, ()
    computation, bound = condition, None
    root = root_of(module.computations[condition])
    while root.opcode in ("fusion", "call"):
        inner = root.named("calls") or root.named("to_apply")
        bound = tuple(_scalar(module, computation, operand, bound) for operand in root.operands)
        computation, root = inner, root_of(module.computations[inner])
    if root.opcode != "compare":
        return None, ()
    return root, tuple(_scalar(module, computation, operand, bound) for operand in root.operands)


def _initial(module: Module, parent: str, loop: Instruction, index: int) -> _Scalar:
    """Element ``index`` of the state that a loop starts from."""
    state = module.computations[parent].get(loop.operands[0])
    if state is None or state.opcode != "tuple" or index >= len(state.operands):
        return ("other", loop.name)
    return _scalar(module, parent, state.operands[index])


def _constant(module: Module, scalar: _Scalar, above: tuple[tuple[str, Instruction], ...]) -> int | None:
    """The value of a scalar: its own, or what the loop outside put there, if each iteration leaves it alone."""
    if scalar[0] == "value":
        return int(scalar[1])
    if scalar[0] != "element" or not above:
        return None
    parent, loop = above[-1]
    body = module.computations[loop.named("body")]
    result = root_of(body)
    if result.opcode != "tuple" or _scalar(module, loop.named("body"), result.operands[scalar[1]]) != scalar:
        return None
    return _constant(module, _initial(module, parent, loop, scalar[1]), above[:-1])


def _step(module: Module, body: str, index: int) -> int | None:
    """What an iteration adds to element ``index`` of the state."""
    result = root_of(module.computations[body])
    if result.opcode != "tuple":
        return None
    kind, parts = _scalar(module, body, result.operands[index])
    if kind != "sum" or ("element", index) not in parts:
        return None
    return next((value for what, value in parts if what == "value" and value), None)
