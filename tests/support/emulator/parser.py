"""PTX text to a list of instructions with resolved registers and labels.  A `Kernel` is parsed once and run often."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from .errors import PtxError
from .numbers import U32, U64, raw

# An operand is a tuple whose first item says what it is:
#   ("reg", number)  ("nreg", number) for !p  ("imm", numpy scalar of raw bits)  ("int", int)  ("sym", name)
#   ("vec", [operands])  ("pair", operand, operand)  ("mem", base operand, offset or, for tensors, 0)  ("lab", index)
Operand = tuple[Any, ...]

_BLANK, _LABEL = re.compile(r"\s*"), re.compile(r"([$\w%]+):(?!:)")
_ARGUMENT = re.compile(r"\{[^{}]*\}|\[[^\[\]]*\]|[^,\s{\[][^,]*")
_SHARED = re.compile(r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b(\d+)\s+([\w$]+)\s*(?:\[(\d*)\])?")
_PARAMETER = re.compile(r"\.(u64|u32|f32|b64|b32|s32|s64|u16|s16|b16|u8|s8|b8|f64)\b")


@dataclass
class Instruction:
    op: str
    mods: list[str]  # what follows the first dot: `ld.global.v4.b32` has ["global", "v4", "b32"]
    args: list[Operand]
    pred: tuple[int, bool] | None  # (register, negated)
    text: str
    line: int  # in the PTX
    source: str  # "file:line" of .loc, or ""
    registers: frozenset[int] = frozenset()
    kernel: Any = None  # the Kernel that it is of
    run: Callable[[Any, Any], None] | None = None  # (machine, mask): bound at the first execution

    def where(self) -> str:
        return f"PTX line {self.line}: {self.text[:160]}" + (f"  ({self.source})" if self.source else "")


@dataclass
class _Scope:
    number: int
    names: dict[str, int] = field(default_factory=dict)


class Kernel:
    """One .entry of a PTX module.

    params: (name, PTX type, bytes), type "b8" for a structure or tensor map; static_shared: bytes; threads: .reqntid
    or .maxntid, None if absent; rtype: type of every register; ins: the instructions.
    """

    def __init__(self, ptx: str, name: str | None = None):
        self.files, ptx, shared = _module(ptx)
        entry = r"\.entry\s+(%s)\s*\((.*?)\)([^{}]*?)\{" % (re.escape(name) if name else r"[\w$]+")
        head = re.search(entry, ptx, re.S)
        if not head:
            raise PtxError(f"no kernel {name or ''} in the PTX")
        self.name = head.group(1)
        self.params = [_parameter(p) for p in re.findall(r"\.param\s+([^,]*)", head.group(2))]
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head.group(3))
        self.threads = int(threads.group(1)) if threads else None
        end = _closing_brace(ptx, head.end())
        body = ptx[head.end() : end]
        self._lay_out_shared(shared, body)
        local = re.search(r"\.local\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\]", body)
        self.local: tuple[str, int] | None = (local.group(1), int(local.group(2))) if local else None
        self.getters: dict[tuple[int, Any], Callable[[Any], Any]] = {}  # of machine.py: operand reads, by identity
        self.operands: dict[str, Operand] = {}  # of the outermost scope, by their text
        self.rtype: list[str] = []
        self.ins: list[Instruction] = []
        self._parse(body, ptx[: head.end()].count("\n") + 1)
        self.raw = [raw(t) for t in self.rtype]
        self.words = [np.dtype(t) for t in self.raw]
        self.ops = {x.op for x in self.ins}

    def _lay_out_shared(self, declared: list[tuple[str, ...]], body: str) -> None:
        """Static variables that the body names, then the dynamic (extern) ones, which all start after them."""
        self.shared: dict[str, int] = {}
        top, dynamic, names = 0, [], set(re.findall(r"[\w$]+", body))
        for extern, align, width, name, count in declared:
            if name not in names:
                continue
            if extern:
                dynamic.append((name, int(align)))
                continue
            top = -(-top // int(align)) * int(align)
            self.shared[name] = top
            top += int(count or 1) * int(width) // 8
        for _, align in dynamic:
            top = -(-top // align) * align
        for name, _ in dynamic:
            self.shared[name] = top
        self.static_shared = top

    # ---- statements
    def _parse(self, body: str, line: int) -> None:
        labels: dict[tuple[int, str], int] = {}
        targets: dict[str, tuple[list[str], tuple[int, ...]]] = {}
        scopes, opened, label, source = [_Scope(0)], 0, "", ""
        position = 0
        statement_end = len(body)
        while True:
            start, position = position, _BLANK.match(body, position).end()  # type: ignore[union-attr]
            line += body.count("\n", start, position)
            if position == statement_end:
                break
            c = body[position]
            if c == "{":
                opened += 1
                scopes.append(_Scope(opened))
                position += 1
            elif c == "}":
                scopes.pop()
                position += 1
            elif found := _LABEL.match(body, position):
                label = found.group(1)
                labels[scopes[-1].number, label] = len(self.ins)
                position = found.end()
            else:
                end = body.index(";", position)
                text, lines = " ".join(body[position:end].split()), body.count("\n", position, end)
                position = end + 1
                chain = (0,) if len(scopes) == 1 else tuple(s.number for s in scopes)
                if text.startswith(".loc"):
                    parts = text.replace(",", " ").split()
                    source = f"{self.files.get(parts[1], parts[1]).rsplit('/', 1)[-1]}:{parts[2]}"
                elif text.startswith(".branchtargets"):
                    targets[label] = ([q.strip() for q in text.split(None, 1)[1].split(",")], chain)
                elif text.startswith(".reg"):
                    self._declare(text, scopes[-1].names)
                    self.operands.clear()
                elif text and not text.startswith((".pragma", ".shared", ".local")):
                    self.ins.append(_instruction(text, line, source, scopes, chain, self.operands))
                line += lines
        self._resolve(labels, targets)

    def _declare(self, text: str, names: dict[str, int]) -> None:
        _, kind, listed = text.replace(".reg .", ".reg ").split(None, 2)
        for n in listed.split(","):
            many = re.match(r"(%?[\w$]+)<(\d+)>", n.strip())
            for q in [f"{many.group(1)}{k}" for k in range(int(many.group(2)))] if many else [n.strip()]:
                names[q] = len(self.rtype)
                self.rtype.append(kind)

    def _resolve(
        self, labels: dict[tuple[int, str], int], targets: dict[str, tuple[list[str], tuple[int, ...]]]
    ) -> None:
        def index(name: str, chain: tuple[int, ...]) -> int:
            return next(labels[c, name] for c in reversed(chain) if (c, name) in labels)

        for x in self.ins:
            if x.op == "brx":
                names, chain = targets[x.args[1][1]]
                x.args[1] = ("targets", np.array([index(q, chain) for q in names]))
            elif x.op == "bra":
                x.args = [("lab", index(x.args[0][1], x.args[0][2]))]
            x.registers = frozenset(_registers(x.args)) | (frozenset([x.pred[0]]) if x.pred else frozenset())
            x.kernel = self


@lru_cache(maxsize=8)
def _module(ptx: str) -> tuple[dict[str, str], str, list[tuple[str, ...]]]:
    """-> files by number, the text without comments, all its shared variables: once for the kernels of a module, whose
    text can be megabytes."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.M))
    ptx = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), ptx, flags=re.S)
    ptx = re.sub(r"//[^\n]*", "", ptx)
    ptx = re.sub(r"^[ \t]*\.(file|section)\b[^\n]*", "", ptx, flags=re.M)
    ptx = re.sub(r"^([ \t]*\.loc\b[^\n]*)$", r"\1;", ptx, flags=re.M)
    return files, ptx, _SHARED.findall(ptx)


def _instruction(
    text: str, line: int, source: str, scopes: list[_Scope], chain: tuple[int, ...], known: dict[str, Operand]
) -> Instruction:
    """known: operands of the outermost scope, of which one text is one operand."""
    pred, full = None, text
    if found := re.match(r"@(!?)(%?[\w$]+)\s+(.*)", text) if text[0] == "@" else None:
        register = _lookup(found.group(2), scopes)
        if register is None:
            raise PtxError(f"unknown predicate in {text!r}")
        pred, text = (register, found.group(1) == "!"), found.group(3)
    op, *rest = text.split(None, 1)
    name, *mods = op.split(".")
    args = []
    for a in map(str.strip, _ARGUMENT.findall(rest[0])) if rest else ():
        operand = known.get(a) if len(scopes) == 1 else None
        if operand is None:
            operand = _operand(a, scopes)
            if len(scopes) == 1:
                known[a] = operand
        args.append(operand)
    if name == "bra":
        args = [("lab", args[0][1], chain)]
    return Instruction(name, mods, args, pred, full, line, source)


def _lookup(name: str, scopes: list[_Scope]) -> int | None:
    for s in reversed(scopes):
        if name in s.names:
            return s.names[name]
    return None


def _operand(a: str, scopes: list[_Scope]) -> Operand:
    if a.startswith("{"):
        return ("vec", [_operand(x.strip(), scopes) for x in a[1:-1].split(",")])
    if a.startswith("["):
        inner = a[1:-1].strip()
        tensor = re.match(r"(.+?)\s*,\s*\{(.*)\}$", inner)
        if tensor:
            coordinates = [_operand(q.strip(), scopes) for q in tensor.group(2).split(",")]
            return ("mem", (_operand(tensor.group(1), scopes), coordinates), 0)
        moved = re.match(r"(.+?)\s*\+\s*(-?\w+)$", inner)
        base, offset = (moved.group(1), int(moved.group(2), 0)) if moved else (inner, 0)
        return ("mem", _operand(base.strip(), scopes), offset)
    if "|" in a:
        first, second = a.split("|")
        return ("pair", _operand(first, scopes), _operand(second, scopes))
    register = _lookup(a, scopes)
    if register is not None:
        return ("reg", register)
    if a.startswith("!") and (register := _lookup(a[1:], scopes)) is not None:
        return ("nreg", register)
    if re.match(r"0[fF][0-9a-fA-F]{8}$", a):
        return ("imm", U32(int(a[2:], 16)))
    if re.match(r"0[dD][0-9a-fA-F]{16}$", a):
        return ("imm", U64(int(a[2:], 16)))
    if re.match(r"-?(0x[0-9a-fA-F]+|\d+)U?$", a):
        return ("int", int(a.rstrip("U"), 0))
    return ("int", int(a == "true")) if a in ("true", "false") else ("sym", a)


def _registers(args: Any) -> list[int]:
    found = []
    for a in args:
        if isinstance(a, (tuple, list)):
            if len(a) == 2 and a[0] in ("reg", "nreg"):
                found.append(a[1])
            else:
                found += _registers(a)
    return found


def _parameter(text: str) -> tuple[str, str, int]:
    kind, name = _PARAMETER.search(text), re.search(r"([\w$]+)\s*(?:\[(\d+)\])?\s*$", text.strip())
    if kind is None or name is None:
        raise PtxError(f"parameter not understood: {text.strip()}")
    return name.group(1), kind.group(1), int(name.group(2) or 1) * int(kind.group(1)[1:]) // 8


def _closing_brace(text: str, at: int) -> int:
    depth = 1
    for found in re.finditer(r"[{}]", text[at:]):
        depth += 1 if found.group() == "{" else -1
        if depth == 0:
            return at + found.start()
    raise PtxError("unbalanced braces")
