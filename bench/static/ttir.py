"""Counting the work of a Triton program in its TTIR, the compiler's first form: which tensors it touches, how often.

Scalars (program ids, sizes, loop bounds) are computed; tensors are only counted.  So the number of times that every
loop runs is exact for the launch at hand, and nothing is executed.

    parse(text)                 the function as a tree of statements
    work(function, args, grid)  {loop: Counter} of one program, averaged over a few programs of the grid

Counts: "flops:<type>" of tl.dot, "exp" (exp, log, sqrt and what else takes the special function unit, division too),
"float" (other float32 operations), "max", "read:<arg>" and "write:<arg>" in bytes, "runs" of the loop's body.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

SIZES = {"i1": 1, "i8": 1, "f8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8}
SPECIAL = ("exp2", "exp", "log2", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "erf")
FLOAT = ("addf", "subf", "mulf", "fma", "negf", "absf")
MAX = ("maximumf", "minimumf", "maxnumf", "minnumf")
BINARY: dict[str, Callable[[int, int], int]] = {
    "addi": lambda a, b: a + b, "subi": lambda a, b: a - b, "muli": lambda a, b: a * b,
    "divsi": lambda a, b: int(a / b) if abs(a) < 2**52 else a // b, "divui": lambda a, b: a // b,
    "ceildivsi": lambda a, b: -(-a // b), "floordivsi": lambda a, b: a // b,
    "remsi": lambda a, b: a - b * int(a / b), "remui": lambda a, b: a % b, "minsi": min, "maxsi": max, "minui": min,
    "maxui": max, "andi": lambda a, b: a & b, "ori": lambda a, b: a | b, "xori": lambda a, b: a ^ b,
    "shli": lambda a, b: a << b, "shrsi": lambda a, b: a >> b, "shrui": lambda a, b: a >> b,
}  # fmt: skip
COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "slt": lambda a, b: a < b, "sle": lambda a, b: a <= b,
    "sgt": lambda a, b: a > b, "sge": lambda a, b: a >= b, "ult": lambda a, b: a < b, "ule": lambda a, b: a <= b,
    "ugt": lambda a, b: a > b, "uge": lambda a, b: a >= b,
}  # fmt: skip
FLOAT_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "oeq": lambda a, b: a == b, "une": lambda a, b: a != b, "olt": lambda a, b: a < b, "ole": lambda a, b: a <= b,
    "ogt": lambda a, b: a > b, "oge": lambda a, b: a >= b, "ord": lambda a, b: a == a and b == b,
    "uno": lambda a, b: a != a or b != b,
}  # fmt: skip
GOLDEN = (5**0.5 - 1) / 2
DESCRIPTORS = ("tt.descriptor_load", "tt.descriptor_gather", "tt.descriptor_store", "tt.descriptor_reduce")
SCALARS = ("tt.get_program_id", "tt.get_num_programs", "tt.load")
MAX_TRIPS = 256  # of a loop whose trips differ from each other: more are sampled


@dataclass
class Statement:
    """One operation; a loop or a branch has regions."""

    op: str
    results: list[str]
    text: str
    regions: list[list[Statement]] = field(default_factory=list)
    number: int = 0  # of a loop, in the order of the text
    root: str = ""  # of a load or store: the argument of the kernel that it goes to

    @cached_property
    def operands(self) -> list[str]:
        return _operands(self.text)

    @cached_property
    def counts(self) -> tuple[tuple[str, float], ...]:
        """What it does to tensors; asked for once `root` is known."""
        return tuple(_count(self).items())

    @cached_property
    def evaluate(self) -> Callable[[list[Any]], Any] | None:
        """The scalar result as a function of the operands; None for what is not an operation on known scalars."""
        name = self.op.rpartition(".")[2]
        if name == "constant":
            m = re.search(r"constant (true|false|-?[\d.eE+-]+)(?=\s|$)", self.text)
            text = m[1] if m else ""
            value = {"true": 1, "false": 0}.get(text)
            if value is None and text:
                value = int(text) if re.fullmatch(r"-?\d+", text) else None
            return lambda known: value
        if name in BINARY:
            return lambda known, f=BINARY[name]: f(*known)  # type: ignore[misc]
        if name == "cmpi":
            return lambda known, f=COMPARE[self.text.split("arith.cmpi ")[1].split(",")[0]]: int(f(*known))  # type: ignore[misc]
        if name == "cmpf":
            return lambda known, f=FLOAT_COMPARE[self.text.split("arith.cmpf ")[1].split(",")[0]]: int(f(*known))  # type: ignore[misc]
        if name == "select":
            return lambda known: known[1] if known[0] else known[2]
        if name in ("extsi", "extui", "trunci", "index_cast"):
            return lambda known: known[0]
        return None

    @cached_property
    def bounds(self) -> tuple[str, str, str, str]:
        """Of a scf.for: its variable, first value, end and step."""
        m = re.search(r"scf\.for %(\S+) = %(\S+) to %(\S+) step %([^\s(]+)", self.text)
        assert m is not None, self.text
        return m[1], m[2], m[3], m[4]

    @cached_property
    def carried(self) -> list[tuple[str, str]]:
        """Of a scf.for: (name inside, initial value) of what is handed from trip to trip."""
        inside = self.text.partition("iter_args(")[2].partition(")")[0]
        return re.findall(r"%([\w.-]+) = %([\w.#-]+)", inside)

    @cached_property
    def is_tensor(self) -> bool:
        return "tensor<" in self.text


@dataclass
class Function:
    name: str
    parameters: dict[str, str]  # name: type
    body: list[Statement]
    loops: list[LoopNode] = field(default_factory=list)


@dataclass
class LoopNode:
    """Where a loop stands among the others, and the kinds of work in it, those of inner loops included."""

    number: int
    inner: list[LoopNode]
    kinds: set[str]


class Unknown(ValueError):
    """The number of trips of a loop depends on values that only the GPU knows."""


def parse(text: str) -> Function:
    """TTIR with one function -> its statements."""
    lines = [re.sub(r"\s*loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", "", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("#", "module", "//"))]
    head = next(i for i, line in enumerate(lines) if line.startswith("tt.func public"))
    name = re.search(r"@([\w.$-]+)", lines[head])
    arguments = lines[head].partition("(")[2]
    pattern = r"%([\w.-]+): (!tt\.ptr<[^>]*>|!tt\.tensordesc<[^>]*>|\w+)"
    parameters = {m[1]: m[2] for m in re.finditer(pattern, arguments)}
    assert name is not None
    numbers = iter(range(1, 10**6))
    body, _ = _region(lines, head + 1, numbers)
    roots = {p: p for p, kind in parameters.items() if kind.startswith("!")}
    body = _trace(body, roots)
    return Function(name[1], parameters, body, _tree(body))


def _trace(body: list[Statement], roots: dict[str, str]) -> list[Statement]:
    """Names what loads and stores touch ("x|y" where it is one of two) -> the statements that count or decide."""
    kept = []
    for s in body:
        sources = dict.fromkeys(roots[name] for name in s.operands if name in roots)
        if s.op == "scf.for":
            for (name, start), result in itertools.zip_longest(s.carried, s.results[: len(s.carried)]):
                if start in roots:
                    roots |= {name: roots[start]} | ({result: roots[start]} if result else {})
        elif s.op in ("tt.load", "tt.store", "tt.atomic_rmw", "tt.dot", *DESCRIPTORS):
            s.root = next(iter(sources), "?")
        elif s.results and sources:
            roots[s.results[0]] = "|".join(sources) if s.op == "arith.select" else next(iter(sources))
        if s.op in ("scf.for", "scf.if", "scf.while"):
            s.regions = [_trace(region, roots) for region in s.regions]
            for region in s.regions:
                if s.op == "scf.if" and region and region[-1].op == "scf.yield":
                    for result, name in zip(s.results, region[-1].operands, strict=False):
                        if name in roots:
                            roots[result] = roots[name]
        decides = s.regions or s.op == "scf.yield" or (not s.is_tensor and (s.evaluate or s.op in SCALARS))
        if decides or s.counts:
            kept.append(s)
    return kept


def _region(lines: list[str], i: int, numbers: Any) -> tuple[list[Statement], int]:
    """Statements from line i to the brace that closes the region -> them, and that brace's line."""
    found: list[Statement] = []
    while i < len(lines) and not lines[i].startswith("}"):
        line = lines[i]
        if line.startswith("^bb"):
            i += 1
            continue
        m = re.match(r"(?:(%[\w.-]+(?::\d+)?(?:, %[\w.-]+(?::\d+)?)*) = )?\"?([\w.]+)\"?", line)
        assert m is not None, line
        statement = Statement(m[2], _results(m[1]), line)
        if m[2] in ("scf.for", "scf.while"):
            statement.number = next(numbers)
        i += 1
        if line.endswith("{"):
            while True:
                region, i = _region(lines, i, numbers)
                statement.regions.append(region)
                statement.text += " " + lines[i]  # what follows the brace: types of a reduction
                more = lines[i].endswith("{")
                i += 1
                if not more:
                    break
        found.append(statement)
    return found, i


def _results(text: str | None) -> list[str]:
    names: list[str] = []
    for part in (text or "").split(", "):
        name, _, count = part.lstrip("%").partition(":")
        if name:
            names += [f"{name}#{k}" for k in range(int(count))] if count else [name]
    return names


def _tree(statements: list[Statement]) -> list[LoopNode]:
    nodes: list[LoopNode] = []
    for s in statements:
        inside = [node for region in s.regions for node in _tree(region)]
        nodes += [LoopNode(s.number, inside, _kinds(s))] if s.op in ("scf.for", "scf.while") else inside
    return nodes


def _kinds(s: Statement) -> set[str]:
    """What is counted in a statement: "flops", "exp", "max", "read", "write", ..."""
    return {kind.partition(":")[0] for kind, _ in s.counts}.union(*(_kinds(t) for region in s.regions for t in region))


def work(
    function: Function, args: Mapping[str, Any], grid: tuple[int, ...], memory: Mapping[str, float] | None = None,
    programs: int = 64,
) -> dict[int, Counter[str]]:  # fmt: skip
    """What one program does, by loop (0 is the code in no loop), averaged over the grid, or part of a large one.

    `args` gives the numbers among the kernel's arguments, `memory` what a scalar load from a named one finds.
    Raises Unknown.
    """
    sizes = (*grid, 1, 1)[:3]
    total = sizes[0] * sizes[1] * sizes[2]
    # the golden ratio spreads evenly and is in step with no tiling
    few = range(total) if total <= 16 * programs else sorted({int(total * (k * GOLDEN % 1)) for k in range(programs)})
    chosen = list(few)
    summed: Counter[tuple[int, str]] = Counter()
    for index in chosen:
        at = (index % sizes[0], index // sizes[0] % sizes[1], index // (sizes[0] * sizes[1]))
        values: dict[str, Any] = {name: args.get(name) for name in function.parameters}
        summed.update(_Counter(at, sizes, values, memory or {}).block(function.body, 0))
    found: dict[int, Counter[str]] = {0: Counter({"runs": 1})}
    for (loop, kind), count in summed.items():
        found.setdefault(loop, Counter())[kind] = count / len(chosen)  # type: ignore[assignment]
    found[0]["runs"] = 1
    return found


@dataclass
class _Counter:
    """The scalars of one program."""

    at: tuple[int, ...]
    sizes: tuple[int, ...]
    values: dict[str, Any]
    memory: Mapping[str, float]

    def block(self, statements: list[Statement], loop: int) -> Counter[tuple[int, str]]:
        counts: Counter[tuple[int, str]] = Counter()
        for s in statements:
            if s.op == "scf.for":
                counts.update(self.trips(s))
            elif s.op == "scf.if":
                counts.update(self.branch(s, loop))
            elif s.op == "scf.while":
                raise Unknown(f"a while loop: {s.text[:80]}")
            else:
                for kind, count in s.counts:
                    counts[loop, kind] += count  # type: ignore[assignment]
                if s.results and not s.is_tensor:
                    self.values[s.results[0]] = self.scalar(s)
        return counts

    def trips(self, s: Statement) -> Counter[tuple[int, str]]:
        variable, *names = s.bounds
        low, high, step = (self.values.get(name) for name in names)
        if low is None or high is None or step is None:
            raise Unknown(f"the bounds of: {s.text[:100]}")
        for name in (*(name for name, _ in s.carried), *s.results):
            self.values[name] = None
        values = range(low, high, step)

        def body(value: int) -> Counter[tuple[int, str]]:
            self.values[variable] = value
            return self.block(s.regions[0], s.number)

        counts: Counter[tuple[int, str]] = Counter()
        if len(values) == 0:
            return counts
        counts[s.number, "runs"] = len(values)
        first = body(values[0])
        if len(values) < 3 or first == body(values[-1]) == body(values[len(values) // 2]):
            chosen = [first] if len(values) != 2 else [first, body(values[1])]
        else:
            chosen = [body(value) for value in values[:: -(-len(values) // MAX_TRIPS)]]
        for one in chosen:
            for key, count in one.items():
                counts[key] += count * len(values) / len(chosen)  # type: ignore[assignment]
        return counts

    def branch(self, s: Statement, loop: int) -> Counter[tuple[int, str]]:
        condition = self.values.get(s.operands[0])
        taken = s.regions[0] if condition is None or condition else s.regions[1] if len(s.regions) > 1 else []
        counts = self.block(taken, loop)
        if taken and taken[-1].op == "scf.yield":
            for result, source in zip(s.results, taken[-1].operands, strict=False):
                self.values[result] = self.values.get(source)
        return counts

    def scalar(self, s: Statement) -> Any:
        """The number that an operation gives, None if it is not known."""
        if s.op == "tt.load":
            return self.memory.get(s.root)
        if s.op == "tt.get_program_id":
            return self.at["xyz".index(s.text.split()[3])]
        if s.op == "tt.get_num_programs":
            return self.sizes["xyz".index(s.text.split()[3])]
        known = [self.values.get(operand) for operand in s.operands]
        return None if None in known or s.evaluate is None else s.evaluate(known)


def _count(s: Statement) -> Counter[str]:
    """What an operation on tensors, or a load or store, does."""
    counts: Counter[str] = Counter()
    name = s.op.rpartition(".")[2]
    types = s.text.rpartition(" : ")[2]
    if s.op in ("tt.dot", "tt.dot_scaled"):
        (m, k), (_, n) = _shapes(types)[:2]
        kind = re.search(r"tensor<[\dx]+x(\w+)>", types)
        assert kind is not None
        precision = re.search(r"inputPrecision = (\w+)", s.text)
        label = (precision[1] if precision else "ieee") if kind[1] == "f32" else kind[1]
        counts[f"flops:{label}"] += 2 * m * n * k
    elif s.op in ("tt.load", "tt.descriptor_load", "tt.descriptor_gather"):
        counts[f"read:{s.root}"] += _bytes(s.text, result=True)
    elif s.op in ("tt.store", "tt.descriptor_store", "tt.atomic_rmw", "tt.descriptor_reduce"):
        counts[f"write:{s.root}"] += _bytes(s.text, result=False)
    elif s.op in ("tt.reduce", "tt.scan"):
        inside = [t.op.rpartition(".")[2] for region in s.regions for t in region]
        elements = max((_product(shape) for shape in _shapes(s.text)), default=0)
        counts["float"] += elements * sum(op in FLOAT for op in inside)
        counts["max"] += elements * sum(op in MAX for op in inside)
    elif "tensor<" in s.text and not s.op.startswith("scf"):
        elements = max((_product(shape) for shape in _shapes(s.text)), default=0)
        special = name in SPECIAL or name == "divf" or bool(re.search(r'"[^"]*(ex2|lg2|exp|log|tanh)', s.text))
        counts["exp"] += elements * special
        counts["float"] += elements * (name in FLOAT)
        counts["max"] += elements * (name in MAX)
    return +counts


def _operands(text: str) -> list[str]:
    """Names of values after the equals sign, in order."""
    body = text.partition(" = ")[2] if re.match(r"%[\w.:,% -]+ = ", text) else text
    return re.findall(r"%([\w.-]+(?:#\d+)?)", body)


def _shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, m.rstrip("x").split("x"))) for m in re.findall(r"(?:tensor|tensordesc)<((?:\d+x)+)", text)]


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _bytes(text: str, result: bool) -> int:
    """Bytes of a load's result, or of what a store stores."""
    types = text.rpartition(" : ")[2]
    found = re.findall(r"(?:tensor|tensordesc)<((?:\d+x)+)(?:!tt\.ptr<)?(\w+)", types)
    if found:
        shape, kind = found[-1] if result else found[0]
        elements = _product(tuple(map(int, shape.rstrip("x").split("x"))))
    else:
        scalar = re.search(r"!tt\.ptr<(\w+)", types)
        elements, kind = 1, scalar[1] if scalar else "f32"
    return elements * next((size for name, size in SIZES.items() if kind.startswith(name)), 4)
