"""Tensor cores of sm_100: tensor memory and tcgen05 instructions of one block (cta_group::1)."""

from __future__ import annotations

import re

import numpy as np

from .asynchronous import arrive
from .errors import OutOfBounds, PtxError
from .machine import Machine, Mask, instruction
from .memory import SHARED_WINDOW, shared_index
from .numbers import U32, U64, to_float32
from .parser import Instruction
from .tensor_core import descriptor_addresses, read_operand

FORMATS = {0: "f16", 1: "bf16", 2: "tf32"}
SWIZZLES = {0: 16, 2: 128, 4: 64, 6: 32}


@instruction("tcgen05")
def _tcgen05(s: Machine, x: Instruction, mask: Mask) -> None:
    kind = x.mods[0].split("::")[0]
    if kind in ("dealloc", "relinquish_alloc_permit", "fence"):
        return
    if kind == "alloc":  # one allocation per block, at column 0
        address = shared_index(s, s.address(x.args[0]), 4, mask)
        s.shared.view(np.uint32)[address[s.active(mask)] // 4] = 0
    elif kind == "wait":
        for w in s.active_warps(mask).tolist():
            s.pending.commit("tcgen05." + x.mods[0].split("::")[1], w)
            s.pending.wait("tcgen05." + x.mods[0].split("::")[1], w, 0)
    elif kind == "commit":
        address = s.address(x.args[0]) % SHARED_WINDOW
        for lane in s.active(mask).tolist():
            block = int(s.block_of[lane])
            actor = s.races.unit("tensor", block) if s.races is not None else None
            arrive(s, (block, int(address[lane])), 1, 0, actor)
    elif kind == "mma":
        for lane in s.active(mask).tolist():
            _mma(s, x, lane)
    elif kind in ("ld", "st"):
        _load_or_store(s, x, mask, kind)
    else:
        raise PtxError("tcgen05 variant not implemented")


def _mma(s: Machine, x: Instruction, lane: int) -> None:
    """D (M, N) in tensor memory = A B^T (+ D); A in shared or tensor memory, B in shared memory."""
    if "cta_group::2" in x.text or not ("kind::f16" in x.text or "kind::tf32" in x.text):
        raise PtxError("tcgen05.mma variant not implemented")
    block, shape = int(s.block_of[lane]), int(s.lanewise(x.args[3], U32)[lane])
    m, n = (shape >> 24 & 31) * 16, (shape >> 17 & 63) * 8
    kind_a, kind_b = FORMATS[shape >> 7 & 7], FORMATS[shape >> 10 & 7]
    size = 2 if "kind::f16" in x.text else 4
    k = 32 // size
    unit = s.races.start(s.races.unit("tensor", block), int(s.warp[lane])) if s.races is not None else None
    lanes = np.arange(m) if m == 128 else np.arange(m) // 16 * 32 + np.arange(m) % 16
    memory = s.tensor_memory[block]
    if x.args[1][0] == "mem":  # A in tensor memory: 16-bit values packed two to a column
        at = int(s.address(x.args[1])[lane])
        columns = (at & 0xFFFF) + np.arange(8)
        _touch(s, block, lanes + (at >> 16), columns, False, unit)
        words = memory[(lanes + (at >> 16))[:, None], columns]
        left = to_float32(np.ascontiguousarray(words).view({2: np.uint16, 4: np.uint32}[size]).reshape(m, k), kind_a)
    else:
        left = _described(s, int(s.lanewise(x.args[1], U64)[lane]), m, k, size, kind_a, shape >> 15 & 1, block, unit)
    right = _described(s, int(s.lanewise(x.args[2], U64)[lane]), n, k, size, kind_b, shape >> 16 & 1, block, unit)
    at = int(s.address(x.args[0])[lane])
    rows, columns = lanes + (at >> 16), (at & 0xFFFF) + np.arange(n)
    if columns[-1] >= 512:
        raise OutOfBounds("tcgen05.mma writes past column 511 of tensor memory")
    _touch(s, block, rows, columns, True, unit)
    d, floats = left @ right.T, memory.view(np.float32)
    add = bool(s.lanewise(x.args[4], np.bool_)[lane])
    floats[rows[:, None], columns] = d + floats[rows[:, None], columns] if add else d


def _described(
    s: Machine, v: int, rows: int, k: int, size: int, kind: str, trans: int, block: int, unit: int | None
) -> np.ndarray:
    start, lead, stride = ((v >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    a = descriptor_addresses(start, lead, stride, SWIZZLES[v >> 61 & 7], rows, k, size, trans)
    return to_float32(read_operand(s, a, size, block, unit, "tcgen05"), kind)


def _touch(s: Machine, block: int, lanes: np.ndarray, columns: np.ndarray, write: bool, actor: int | None) -> None:
    if s.races is not None and actor is not None:
        places = s.races.tensor_places(block, np.unique(lanes // 32), columns)
        s.races.touch(places, write, np.full(len(places), actor))


def _load_or_store(s: Machine, x: Instruction, mask: Mask, kind: str) -> None:
    shape = next(q for q in x.mods if re.match(r"\d+x\d+bx?\d*$", q))
    registers = next(a for a in x.args if a[0] in ("vec", "reg"))
    registers = registers[1] if registers[0] == "vec" else [registers]
    address = s.address(next(a for a in x.args if a[0] == "mem"))
    lane, row, column = s.thread % 32, address >> 16, address & 0xFFFF
    if shape == "32x32b":
        row = row + lane
    elif shape == "16x32bx2":
        row = row + lane % 16
        column = column + np.where(lane >= 16, next((q[1] for q in x.args if q[0] == "int"), 0), 0)
    else:
        raise PtxError(f"tcgen05.{kind} of shape {shape} is not implemented")
    on = s.active(mask)
    if (row[on] // 32 != s.thread[on] // 32 % 4).any():
        raise PtxError(f"tcgen05.{kind}: a warp touches tensor memory lanes of another warp's quarter")
    if (column[on] + len(registers) > 512).any():
        raise OutOfBounds(f"tcgen05.{kind} past column 511 of tensor memory")
    if s.races is not None:
        for w in s.whole_warps(mask).tolist():
            first = column[32 * w : 32 * w + 32]
            columns = np.unique(np.unique(first)[:, None] + np.arange(len(registers)))
            block, quarter = w // s.warps_per_block, w % s.warps_per_block % 4
            places = s.races.tensor_places(block, [quarter], columns)
            s.races.touch(places, kind == "st", np.full(len(places), s.races.of_warp[w]))
    memory, block = s.tensor_memory, s.block_of[on]
    for j, register in enumerate(registers):
        if kind == "st":
            memory[block, row[on], column[on] + j] = s.lanewise(register, U32)[on]
        else:
            values = np.zeros(s.lanes, np.uint32)
            values[on] = memory[block, row[on], column[on] + j]
            s.put(register, values, mask)
    if kind == "ld":
        s.pending.start("tcgen05.ld", s.whole_warps(mask), {r[1] for r in registers})
