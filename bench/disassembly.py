"""Reading machine code: the innermost loops of a compiled module's functions, from `objdump -d` (binutils)."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\t(\S+)\s*(.*)$")
_TARGET = re.compile(r"^([0-9a-f]+)\b")
_WIDTHS = {"zmm": 16, "ymm": 8, "xmm": 4}  # floats in a register


@dataclass(frozen=True)
class Instruction:
    """One line of the listing (x86-64, AT&T syntax)."""

    address: int
    mnemonic: str
    operands: str

    @property
    def floats(self) -> int:
        """How many floats its widest vector register holds; 0 without one."""
        return max((width for name, width in _WIDTHS.items() if f"%{name}" in self.operands), default=0)

    @property
    def arithmetic(self) -> bool:
        """True for what computes with vectors, of floats or bits; loads, stores and broadcasts from memory do not."""
        name = self.mnemonic.removeprefix("v")
        bits = name.startswith(("pcmp", "pand", "por", "pxor"))
        return self.floats > 0 and (bits or (name.endswith("ps") and not name.startswith(("mov", "broadcast"))))


Loop = tuple[Instruction, ...]


class Unreadable(RuntimeError):
    """There is no listing, or it does not have what was looked for; the message says which."""


@lru_cache
def listing(module: Path) -> str:
    """The text of `objdump -d`.  Raises Unreadable."""
    tool = shutil.which("objdump")
    if tool is None:
        raise Unreadable("objdump (binutils) is not installed")
    done = subprocess.run([tool, "-d", "--no-show-raw-insn", str(module)], capture_output=True, text=True)
    if done.returncode:
        raise Unreadable(f"objdump: {done.stderr.strip()}")
    return done.stdout


def functions(text: str, *parts: str) -> list[tuple[str, Loop]]:
    """(symbol, code) of every function whose mangled name has all of `parts`, by address."""
    found: list[tuple[str, Loop]] = []
    name, code = "", []  # type: str, list[Instruction]
    for line in [*text.splitlines(), "0 <>:", "0 <end>:"]:
        header = _FUNCTION.match(line)
        if line == "0 <>:" or header:
            if name:
                found.append((name, tuple(code)))
            name, code = header[1] if header and all(part in header[1] for part in parts) else "", []
        elif name and (match := _INSTRUCTION.match(line)):
            code.append(Instruction(int(match[1], 16), match[2], match[3]))
    return found


def innermost_loops(code: Loop) -> list[Loop]:
    """The bodies, jump included, of the backward jumps that have no other backward jump inside."""
    spans = []
    for at, instruction in enumerate(code):
        target = _TARGET.match(instruction.operands) if instruction.mnemonic.startswith("j") else None
        if target and code[0].address <= int(target[1], 16) <= instruction.address:
            spans.append((int(target[1], 16), at))
    bodies = []
    for start, end in spans:
        inside = (s >= start and e <= end and (s, e) != (start, end) for s, e in spans)
        if not any(inside):
            bodies.append(tuple(i for i in code[: end + 1] if i.address >= start))
    return bodies
