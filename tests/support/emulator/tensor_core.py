"""Tensor cores of sm_80 to sm_90: ldmatrix, stmatrix, mma.sync, wgmma.  Products and sums in float32."""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from .errors import OutOfBounds, PtxError
from .machine import Machine, Mask, instruction
from .memory import SHARED_WINDOW
from .numbers import RAW, U32, U64, bf16_to_f32, tf32_truncate, to_float32
from .parser import Instruction, Operand

ELEMENT_BYTES = {"bf16": 2, "f16": 2, "tf32": 4}


def _matrix_rows(
    s: Machine, x: Instruction, operand: Operand, mask: Mask, write: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Warps, word indices (rows of 8 x 8 matrices, 4) and number of matrices of ldmatrix or stmatrix."""
    count = 4 if "x4" in x.mods else 2 if "x2" in x.mods else 1
    warps = s.whole_warps(mask)
    rows = s.address(operand).reshape(-1, 32)[warps][:, : 8 * count].reshape(-1)
    rows = np.where(rows >= SHARED_WINDOW, rows - SHARED_WINDOW, rows)
    if ((rows < 0) | (rows + 16 > s.shared_bytes) | (rows % 16 != 0)).any():
        raise OutOfBounds(f"{x.op} row address out of bounds or not 16-byte aligned")
    owner = np.repeat(warps, 8 * count)
    rows = rows + owner // s.warps_per_block * s.shared_width
    if s.races is not None:
        s.races.access(rows, 16, write, s.races.of_warp[owner])
    return warps, (rows // 4)[:, None] + np.arange(4), count


def _transpose(words: np.ndarray) -> np.ndarray:
    """Words (warps, matrices, 8, 4) of 8 x 8 matrices of 16-bit values, transposed."""
    halves = np.ascontiguousarray(words).view(np.uint16)
    return np.ascontiguousarray(halves.transpose(0, 1, 3, 2)).view(np.uint32)


@instruction("ldmatrix")
def _ldmatrix(s: Machine, x: Instruction, mask: Mask) -> None:
    warps, index, count = _matrix_rows(s, x, x.args[1], mask, False)
    words = s.shared.view(np.uint32)[index].reshape(len(warps), count, 8, 4)
    if "trans" in x.mods:
        words = _transpose(words)
    targets = x.args[0][1] if x.args[0][0] == "vec" else [x.args[0]]
    for i, target in enumerate(targets):
        full = np.zeros((s.lanes // 32, 32), np.uint32)
        full[warps] = words[:, i].reshape(len(warps), 32)
        s.put(target, full.reshape(-1), mask)


@instruction("stmatrix")
def _stmatrix(s: Machine, x: Instruction, mask: Mask) -> None:
    warps, index, _ = _matrix_rows(s, x, x.args[0], mask, True)
    sources = x.args[1][1] if x.args[1][0] == "vec" else [x.args[1]]
    words = np.stack([s.lanewise(v, U32).reshape(-1, 8, 4)[warps] for v in sources], 1)
    if "trans" in x.mods:
        words = _transpose(words)
    s.shared.view(np.uint32)[index] = words.reshape(-1, 4)


def _pair(s: Machine, operand: Operand, kind: str) -> np.ndarray:
    """Registers of two 16-bit values as float32 (warps, group 8, lane of the group 4, 2)."""
    u = np.ascontiguousarray(s.lanewise(operand, U32)).view(np.uint16).reshape(-1, 8, 4, 2)
    return bf16_to_f32(u) if kind == "bf16" else u.view(np.float16).astype(np.float32)


def _single(s: Machine, operand: Operand) -> np.ndarray:
    return tf32_truncate(s.lanewise(operand, np.float32)).reshape(-1, 8, 4)


def fragment_a(s: Machine, registers: list[Operand], kind: str, k: int) -> np.ndarray:
    """The 16 x k operand A of every warp, from its registers: (warps, 16, k)."""
    if kind == "tf32":
        parts, width = [_single(s, r) for r in registers], 4
    else:
        parts, width = [_pair(s, r, kind) for r in registers], 8
    a = np.empty((len(parts[0]), 2, 8, k // width, *parts[0].shape[2:]), np.float32)
    for i, p in enumerate(parts):  # rows g, rows g + 8, then the same of the upper half of k
        a[:, i % 2, :, i // 2] = p
    return a.reshape(-1, 16, k)


def _fragment_b(s: Machine, registers: list[Operand], kind: str, k: int) -> np.ndarray:
    """The operand B of every warp: (warps, 8, k)."""
    parts = [_single(s, r) if kind == "tf32" else _pair(s, r, kind) for r in registers]
    b = np.empty((len(parts[0]), 8, len(parts), *parts[0].shape[2:]), np.float32)
    for i, p in enumerate(parts):
        b[:, :, i] = p
    return b.reshape(-1, 8, k)


@instruction("mma")
def _mma(s: Machine, x: Instruction, mask: Mask) -> None:
    shape = next((q for q in x.mods if q.startswith("m16n8k")), None)
    i = x.mods.index("col") if "col" in x.mods else -1
    kinds = x.mods[i + 1 : i + 5]
    if shape is None or i < 0 or kinds[0] != "f32" or kinds[1] not in ELEMENT_BYTES:
        raise PtxError("mma variant not implemented")
    k = int(shape[6:])
    s.whole_warps(mask)
    a = fragment_a(s, x.args[1][1], kinds[1], k)
    b = _fragment_b(s, x.args[2][1] if x.args[2][0] == "vec" else [x.args[2]], kinds[2], k)
    d = np.matmul(a, b.transpose(0, 2, 1)).reshape(-1, 2, 8, 4, 2)  # warp, upper rows, group, lane, column
    for j, target in enumerate(x.args[0][1]):
        product = np.ascontiguousarray(d[:, j // 2, :, :, j % 2]).reshape(-1)
        s.put(target, product + s.get(x.args[3][1][j], np.float32), mask)


Addresses = tuple[np.ndarray, np.ndarray, int, int]  # of elements; of their words; the lowest and the highest element's


def addresses(a: np.ndarray) -> Addresses:
    """Those of a block's shared memory, to be kept: read-only."""
    words = np.unique(a >> 2) * 4
    for array in (a, words):
        array.flags.writeable = False
    return a, words, int(a.min()), int(a.max())


@lru_cache(maxsize=512)
def descriptor_addresses(
    start: int, lead: int, stride: int, swizzle: int, rows: int, k: int, size: int, trans: int
) -> Addresses:
    """Shared byte addresses (rows, k) of a matrix described to wgmma or tcgen05; swizzle: 16 (none), 32, 64, 128 B."""
    r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
    if trans:
        e = swizzle // size
        a = start + (r // e) * lead + (r % e) * size + (c % 8) * swizzle + (c // 8) * stride
    else:
        byte = c * size
        a = start + (r // 8) * stride + (r % 8) * swizzle + (byte // swizzle) * lead + byte % swizzle
    return addresses(a ^ (((a >> 7) & (swizzle // 16 - 1)) << 4))


def read_operand(s: Machine, described: Addresses, size: int, block: int, reader: int | None, what: str) -> np.ndarray:
    """Raw bits at shared addresses of a block, read by an actor; checked."""
    a, words, lowest, highest = described
    if lowest < 0 or highest + size > s.shared_bytes:
        raise OutOfBounds(f"{what} operand outside shared memory")
    start = block * s.shared_width
    if s.races is not None and reader is not None:
        s.races.access(words + start, 4, False, np.full(len(words), reader))
    return s.shared[: s.shared.size // size * size].view(RAW[8 * size])[(a + start) // size]


def _described(
    s: Machine, operand: Operand, rows: int, k: int, kind: str, trans: int, groups: np.ndarray
) -> np.ndarray:
    """(warpgroups, rows, k) float32; zeros for warpgroups that do not take part."""
    descriptors = s.lanewise(operand, U64).reshape(-1, 128)
    if not (descriptors == descriptors[:, :1])[groups].all():
        raise PtxError("wgmma descriptor differs between the lanes of a warpgroup")
    out = np.zeros((len(descriptors), rows, k), np.float32)
    size = ELEMENT_BYTES[kind]
    for g in groups.tolist():
        v = int(descriptors[g, 0])
        start, lead, stride = ((v >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        a = descriptor_addresses(start, lead, stride, {0: 16, 1: 128, 2: 64, 3: 32}[v >> 62 & 3], rows, k, size, trans)
        block, number = divmod(g * 128, s.threads)
        reader = s.races.unit("wgmma", block, number // 128) if s.races is not None else None
        out[g] = to_float32(read_operand(s, a, size, block, reader, "wgmma"), kind)
    return out


@instruction("wgmma")
def _wgmma(s: Machine, x: Instruction, mask: Mask) -> None:
    warps = s.whole_warps(mask)
    if x.mods[0] == "fence":
        return
    if x.mods[0] in ("commit_group", "wait_group"):
        for w in warps.tolist():
            _group(s, x, w)
        return
    n, k = map(int, next(found for q in x.mods if (found := re.match(r"m64n(\d+)k(\d+)$", q))).groups())
    kind = x.mods[-2]
    if kind not in ELEMENT_BYTES or "f32" not in x.mods:
        raise PtxError("wgmma variant not implemented")
    groups = np.unique(warps // 4)
    if s.races is not None:
        for w in warps.tolist():
            block, number = divmod(w, s.warps_per_block)
            s.races.start(s.races.unit("wgmma", block, number // 4), w)
    accumulators, a, b = x.args[0][1], x.args[1], x.args[2]
    scale_d = s.get(x.args[3], np.bool_)
    scale_a, scale_b, *transposed = [q[1] for q in x.args[4:]]
    if a[0] == "vec":
        left = fragment_a(s, a[1], kind, k).reshape(-1, 64, k)
        trans_b = transposed[0] if transposed else 0
    else:
        left = _described(s, a, 64, k, kind, transposed[0] if transposed else 0, groups)
        trans_b = transposed[1] if transposed else 0
    right = _described(s, b, n, k, kind, trans_b, groups)
    d = np.matmul(left, right.transpose(0, 2, 1)) * np.float32(scale_a * scale_b)
    d = d.reshape(len(d), 4, 2, 8, n // 8, 4, 2)  # warpgroup, warp, upper rows, group, columns / 8, lane, column
    for q, target in enumerate(accumulators):
        v = np.ascontiguousarray(d[:, :, q // 2 % 2, :, q // 4, :, q % 2]).reshape(-1)
        s.put(target, np.where(scale_d, v + s.get(target, np.float32), v), mask)
    s.pending.start("wgmma", warps, {o[1] for o in accumulators})


def _group(s: Machine, x: Instruction, warp: int) -> None:
    block, number = divmod(warp, s.warps_per_block)
    if x.mods[0] == "commit_group":
        clock = s.races.release(s.races.unit("wgmma", block, number // 4)) if s.races is not None else None
        s.pending.commit("wgmma", warp, clock)
        return
    for clock in s.pending.wait("wgmma", warp, x.args[0][1]):
        if s.races is not None:
            s.races.acquire(int(s.races.of_warp[warp]), clock)
