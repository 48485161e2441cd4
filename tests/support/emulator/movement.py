"""Moves between registers and memory: mov, ld, st, cvta, atom, red."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import OutOfBounds, PtxError
from .machine import Machine, Mask, bound, instruction, reader
from .memory import LOCAL_WINDOW, SHARED_WINDOW, global_index, load, shared_index, space_of, store
from .numbers import DTYPES, RAW, U64, bits
from .parser import Instruction, Operand

WIDTHS = {"v2": 2, "v4": 4, "v8": 8}


@bound("mov")
def _mov(x: Instruction) -> Callable[[Machine, Mask], None]:
    kind, (target, source) = x.mods[-1], x.args
    if target[0] == "vec" or (source[0] == "vec" and len(source[1]) > 1):
        return lambda s, mask: _repack(s, x, mask)
    read = reader(x.kernel, source, np.bool_ if kind == "pred" else DTYPES[kind])
    return lambda s, mask: s.put(target, read(s), mask)


def _repack(s: Machine, x: Instruction, mask: Mask) -> None:
    kind, (target, source) = x.mods[-1], x.args
    if source[0] == "vec" and len(source[1]) > 1:  # pack
        wide = bits(DTYPES[kind])
        each = wide // len(source[1])
        packed = np.zeros(s.lanes, RAW[wide])
        for i, part in enumerate(source[1]):
            packed |= s.lanewise(part, RAW[each]).astype(RAW[wide]) << RAW[wide](each * i)
        s.put(target, packed, mask)
    else:  # unpack
        wide = bits(DTYPES[kind])
        each, value = wide // len(target[1]), s.get(source, RAW[wide])
        for i, part in enumerate(target[1]):
            s.put(part, (value >> RAW[wide](each * i)).astype(RAW[each]), mask)


@instruction("ld", "ldu")
def _ld(s: Machine, x: Instruction, mask: Mask) -> None:
    dtype = RAW[bits(DTYPES[x.mods[-1]])] if x.mods[-1][0] != "s" else DTYPES[x.mods[-1]]
    target, source = x.args[0], x.args[1]
    targets = target[1] if target[0] == "vec" else [target]
    if x.mods[0] == "param":
        values = _parameter(s, source, dtype, len(targets))
    else:
        address = s.address(source)
        values = load(s, address, dtype, mask, len(targets), space_of(x.mods, address))
    for operand, value in zip(targets, values, strict=True):
        if dtype in (np.int8, np.int16):  # signed loads extend to the register
            value = value.astype(np.int64).astype(s.kernel.raw[operand[1]])
        s.put(operand, value, mask)


def _parameter(s: Machine, source: Operand, dtype: type, count: int) -> list[np.ndarray]:
    block, size = s.params[source[1][1]], np.dtype(dtype).itemsize
    if source[2] + count * size > len(block):
        raise OutOfBounds(f"ld.param of {count * size} B at byte {source[2]} of a parameter of {len(block)} B")
    return list(np.frombuffer(block[source[2] : source[2] + count * size], dtype))


@instruction("st")
def _st(s: Machine, x: Instruction, mask: Mask) -> None:
    dtype = RAW[bits(DTYPES[x.mods[-1]])]
    address = s.address(x.args[0])
    values = [s.get(v, dtype) for v in (x.args[1][1] if x.args[1][0] == "vec" else [x.args[1]])]
    store(s, address, dtype, values, mask, space_of(x.mods, address))


@instruction("cvta")
def _cvta(s: Machine, x: Instruction, mask: Mask) -> None:
    spaces = {m.split("::")[0] for m in x.mods}
    window = U64(SHARED_WINDOW if "shared" in spaces else LOCAL_WINDOW if "local" in spaces else 0)
    value = s.get(x.args[1], U64)
    s.put(x.args[0], value - window if x.mods[0] == "to" else value + window, mask)


@instruction("atom", "red")
def _atom(s: Machine, x: Instruction, mask: Mask) -> None:
    """One lane after the other, in the order of their numbers."""
    returns, dtype = x.op == "atom", DTYPES[x.mods[-1]]
    operation = next(q for q in x.mods if q in ("add", "max", "min", "exch", "cas", "and", "or", "xor"))
    if x.mods[-1] in ("bf16", "bf16x2", "f16x2"):
        raise PtxError("atomics of packed or bf16 values are not implemented")
    address, size = s.address(x.args[1 if returns else 0]), np.dtype(dtype).itemsize
    if space_of(x.mods, address) == "shared":
        index, memory = shared_index(s, address, size, mask), s.shared
    else:
        index, memory = global_index(s, address, size, mask, True), s.memory.bytes
    cells = memory[: memory.size // size * size].view(dtype)
    operands = x.args[2 if returns else 1 :]
    values = [s.lanewise(q, dtype) for q in (operands[0][1] if operands[0][0] == "vec" else operands)]
    out = np.zeros(s.lanes, dtype)
    for lane in s.active(mask).tolist():
        place = int(index[lane]) // size
        old, value = cells[place], values[0][lane]
        out[lane] = old
        if operation == "cas":
            cells[place] = values[1][lane] if old == value else old
        else:
            cells[place] = _ATOMICS[operation](old, value)
    if returns:
        s.put(x.args[0], out, mask)


_ATOMICS = {
    "add": np.add,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, value: value,
}
