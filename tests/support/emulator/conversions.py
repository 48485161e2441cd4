"""Conversions and bit manipulation: cvt, prmt, bfe, bfi, shf, lop3, popc, clz, brev."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import PtxError
from .machine import bound
from .numbers import DTYPES, RAW, U32, U64, bf16_to_f32, bits, f32_to_bf16, flush_subnormals, tf32_round
from .parser import Instruction

Run = Callable[[Any, Any], None]
ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@bound("cvt")
def _cvt(x: Instruction) -> Run:
    target, source = x.mods[-2:]
    if target in ("bf16x2", "f16x2"):
        return _cvt_pair(x, target)
    rounding = next((ROUND[q] for q in x.mods if q in ROUND), None)
    if (any(q in ("rz", "rm", "rp") for q in x.mods) and target[0] == "f") or any(
        "e4m3" in q or "e5m2" in q for q in x.mods
    ):
        raise PtxError("cvt variant not implemented")

    def run(s: Any, mask: Any) -> None:
        a = s.get(x.args[1], DTYPES[source])
        if source == "bf16":
            a = bf16_to_f32(a)
        if "ftz" in x.mods and source == "f32":
            a = flush_subnormals(a)
        if target == "bf16":
            a = np.asarray(a, np.float32)
            v = f32_to_bf16(np.maximum(a, 0) if "relu" in x.mods else a)
        elif target == "tf32":
            v = tf32_round(a).view(np.uint32)
        elif target[0] in "us" and (source[0] == "f" or source == "bf16"):
            info = np.iinfo(DTYPES[target])
            f = rounding(np.asarray(a, np.float64))
            v = np.clip(np.nan_to_num(f, nan=0.0, posinf=np.inf, neginf=-np.inf), float(info.min), float(info.max))
            v = np.where(f >= float(info.max), info.max, v.astype(DTYPES[target]))
        elif target[0] in "us" and "sat" in x.mods:
            info = np.iinfo(DTYPES[target])
            v = np.clip(a, max(info.min, np.iinfo(a.dtype).min), min(info.max, np.iinfo(a.dtype).max)).astype(
                DTYPES[target]
            )
        else:
            a = rounding(a) if rounding is not None and target[0] == "f" else a
            v = np.asarray(np.clip(a, 0, 1) if "sat" in x.mods else a).astype(DTYPES[target])
            if target[0] in "us" and bits(v.dtype) < 32:  # registers are wider: the value extends by its own sign
                v = v.astype(np.int64).astype(s.kernel.raw[x.args[0][1]])
        s.put(x.args[0], v, mask)

    return run


def _cvt_pair(x: Instruction, target: str) -> Run:
    def half(f: np.ndarray) -> np.ndarray:
        f = np.maximum(f, 0) if "relu" in x.mods else f
        return f32_to_bf16(f) if target == "bf16x2" else f.astype(np.float16).view(np.uint16)

    def run(s: Any, mask: Any) -> None:
        high, low = (s.lanewise(a, np.float32) for a in x.args[1:3])
        s.put(x.args[0], half(high).astype(np.uint32) << U32(16) | half(low).astype(np.uint32), mask)

    return run


@bound("prmt")
def _prmt(x: Instruction) -> Run:
    if x.mods != ["b32"]:
        raise PtxError("prmt modes are not implemented")

    def run(s: Any, mask: Any) -> None:
        a, b, c = (s.lanewise(q, U32).astype(np.uint64) for q in x.args[1:4])
        both, r = a | (b << U64(32)), np.zeros(s.lanes, np.uint64)
        for i in range(4):
            byte = (both >> ((c >> U64(4 * i) & U64(7)) * U64(8))) & U64(0xFF)
            sign = (c >> U64(4 * i + 3) & U64(1)) == 1
            r |= np.where(sign, np.where(byte & U64(0x80), U64(0xFF), U64(0)), byte) << U64(8 * i)
        s.put(x.args[0], r.astype(np.uint32), mask)

    return run


@bound("bfe")
def _bfe(x: Instruction) -> Run:
    dtype = DTYPES[x.mods[-1]]
    word = U64 if bits(dtype) == 64 else U32

    def run(s: Any, mask: Any) -> None:
        a = s.lanewise(x.args[1], word).astype(np.uint64)
        start, length = (s.lanewise(q, U32).astype(np.uint64) & U64(255) for q in x.args[2:4])
        field = (U64(1) << np.minimum(length, U64(63))) - U64(1)
        r = (a >> np.minimum(start, U64(63))) & field
        if x.mods[-1][0] == "s":  # the top bit of the field, or of the register
            sign = (a >> np.minimum(start + length - U64(1), U64(bits(dtype) - 1))) & U64(1)
            r = np.where((length > 0) & (sign == 1), r | ~field, r)
        s.put(x.args[0], r.astype(RAW[bits(dtype)]), mask)

    return run


@bound("bfi")
def _bfi(x: Instruction) -> Run:
    dtype = DTYPES[x.mods[-1]]

    def run(s: Any, mask: Any) -> None:
        a, b = (s.lanewise(q, dtype).astype(np.uint64) for q in x.args[1:3])
        start, length = (s.lanewise(q, U32).astype(np.uint64) & U64(255) for q in x.args[3:5])
        field = ((U64(1) << np.minimum(length, U64(63))) - U64(1)) << np.minimum(start, U64(63))
        r = (b & ~field) | ((a << np.minimum(start, U64(63))) & field)
        s.put(x.args[0], r.astype(dtype), mask)

    return run


@bound("shf")
def _shf(x: Instruction) -> Run:
    left, wrap = x.mods[0] == "l", x.mods[1] == "wrap"

    def run(s: Any, mask: Any) -> None:
        low, high, c = (s.lanewise(q, U32).astype(np.uint64) for q in x.args[1:4])
        c = c & U64(31) if wrap else np.minimum(c, U64(32))
        v = high << U64(32) | low
        s.put(x.args[0], ((v << c) >> U64(32) if left else v >> c).astype(np.uint32), mask)

    return run


@bound("lop3")
def _lop3(x: Instruction) -> Run:
    table = x.args[4][1]

    def run(s: Any, mask: Any) -> None:
        a, b, c = (s.get(q, U32) for q in x.args[1:4])
        r = np.zeros(s.lanes, np.uint32)
        for i in range(8):
            if table >> i & 1:
                r = r | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        s.put(x.args[0], r, mask)

    return run


@bound("popc", "clz", "brev")
def _count(x: Instruction) -> Run:
    width = bits(DTYPES[x.mods[-1]])

    def run(s: Any, mask: Any) -> None:
        a = s.lanewise(x.args[1], RAW[width])
        each = (a[:, None] >> np.arange(width - 1, -1, -1).astype(a.dtype)) & a.dtype.type(1)  # highest bit first
        if x.op == "popc":
            r = each.sum(1).astype(np.uint32)
        elif x.op == "clz":
            r = np.where(each.any(1), each.argmax(1), width).astype(np.uint32)
        else:
            r = (each << np.arange(width).astype(a.dtype)).sum(1).astype(a.dtype)
        s.put(x.args[0], r, mask)

    return run
