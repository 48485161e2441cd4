"""PTX types as numpy types, and the floating-point formats that numpy lacks."""

from __future__ import annotations

from typing import Any

import numpy as np

np.seterr(all="ignore")
U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64

DTYPES: dict[str, Any] = {
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "bf16": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "bf16x2": np.uint32,
    "f16x2": np.uint32,
    "tf32": np.uint32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
    "f32x2": np.uint64,
    "pred": np.bool_,
}
RAW: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}  # registers hold raw bits


def bits(dtype: Any) -> int:
    return 8 * np.dtype(dtype).itemsize


def raw(ptx_type: str) -> Any:
    """The numpy type in which a register of this PTX type is kept."""
    return np.bool_ if ptx_type == "pred" else RAW[bits(DTYPES[ptx_type])]


def bf16_to_f32(u: np.ndarray) -> np.ndarray:
    return (np.asarray(u).astype(np.uint32) << U32(16)).view(np.float32)


def f32_to_bf16(f: np.ndarray) -> np.ndarray:
    """Round to nearest even; every NaN becomes the canonical 0x7FFF."""
    u = np.ascontiguousarray(f, dtype=np.float32).view(np.uint32)
    half = ((u >> U32(16)) & U32(1)) + U32(0x7FFF)
    return np.where(np.isnan(f), U16(0x7FFF), ((u + half) >> U32(16)).astype(np.uint16))


def tf32_truncate(f: np.ndarray) -> np.ndarray:
    """What a tensor core keeps of a float32 operand: 10 bits of mantissa."""
    return (np.ascontiguousarray(f, dtype=np.float32).view(np.uint32) & U32(0xFFFFE000)).view(np.float32)


def tf32_round(f: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32: to nearest, ties away from zero; inf and NaN unchanged."""
    u = np.ascontiguousarray(f, dtype=np.float32).view(np.uint32)
    return np.where(np.isfinite(f), (u + U32(0x1000)) & U32(0xFFFFE000), u).view(np.float32)


def flush_subnormals(f: np.ndarray) -> np.ndarray:
    """.ftz: subnormal float32 values become zero of the same sign."""
    tiny = np.abs(f) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), f), f) if tiny.any() else f


def to_float32(raw_bits: np.ndarray, kind: str) -> np.ndarray:
    """Raw operand bits of a tensor-core instruction (bf16, f16 or tf32) as float32."""
    u = np.ascontiguousarray(raw_bits)
    if kind == "bf16":
        return bf16_to_f32(u)
    return u.view(np.float16).astype(np.float32) if kind == "f16" else tf32_truncate(u.view(np.float32))
