"""Arithmetic of one lane: integers, floats, comparisons, bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import PtxError
from .machine import INSTRUCTIONS, bound, reader
from .numbers import DTYPES, RAW, U16, U32, U64, bf16_to_f32, bits, f32_to_bf16, flush_subnormals
from .parser import Instruction

Run = Callable[[Any, Any], None]
WIDER: dict[Any, Any] = {np.int16: np.int32, np.uint16: np.uint32, np.int32: np.int64, np.uint32: np.uint64}


def _elementwise(x: Instruction, f: Callable[..., Any]) -> Run:
    """f on the operands after the first as numbers of the instruction's type; packed types lane by lane of the pack."""
    kind, target, sources = x.mods[-1], x.args[0], x.args[1:]
    if (
        kind in ("bf16", "f16") and "f32" in x.mods
    ):  # sm_100's add, sub, fma of mixed precision: all but the last operand

        def run(s: Any, mask: Any) -> None:
            narrow = [np.ascontiguousarray(s.lanewise(a, U16)).view(np.uint16) for a in sources[:-1]]
            values = [bf16_to_f32(v) if kind == "bf16" else v.view(np.float16).astype(np.float32) for v in narrow]
            result = np.asarray(f(*values, s.get(sources[-1], np.float32)), np.float32)
            s.put(target, result, mask)

    elif kind in ("bf16", "bf16x2"):
        word = U32 if kind == "bf16x2" else U16

        def run(s: Any, mask: Any) -> None:
            values = [bf16_to_f32(np.ascontiguousarray(s.lanewise(a, word)).view(np.uint16)) for a in sources]
            s.put(target, np.ascontiguousarray(f32_to_bf16(f(*values))).view(word), mask)

    elif kind in ("f16x2", "f32x2"):
        word, part = (U32, np.float16) if kind == "f16x2" else (U64, np.float32)

        def run(s: Any, mask: Any) -> None:
            values = [np.ascontiguousarray(s.lanewise(a, word)).view(part) for a in sources]
            s.put(target, np.ascontiguousarray(np.asarray(f(*values)).astype(part)).view(word), mask)

    else:
        dtype = DTYPES[kind]
        ftz = "ftz" in x.mods and dtype is np.float32
        reads = [reader(x.kernel, a, dtype) for a in sources]

        def run(s: Any, mask: Any) -> None:
            values = [read(s) for read in reads]
            if ftz:
                result = flush_subnormals(np.asarray(f(*map(flush_subnormals, values)), np.float32))
            else:
                result = np.asarray(f(*values)).astype(dtype, copy=False)
            s.put(target, result, mask)

    return run


def _define(name: str, f: Callable[..., Any]) -> None:
    INSTRUCTIONS[name] = lambda x: _elementwise(x, f)


def _in_double(f: Callable[..., Any]) -> Callable[..., Any]:
    """Computes in float64 and rounds once to float32: closer than the hardware's approximations."""
    return lambda *values: f(*(np.asarray(v, np.float64) for v in values)).astype(np.float32)


for _name, _f in {
    "add": np.add,
    "sub": np.subtract,
    "neg": np.negative,
    "abs": np.abs,
    "rem": np.fmod,
    "copysign": lambda a, b: np.copysign(b, a),
    "ex2": _in_double(np.exp2),
    "lg2": _in_double(np.log2),
    "rcp": _in_double(np.reciprocal),
    "sqrt": _in_double(np.sqrt),
    "rsqrt": _in_double(lambda a: 1 / np.sqrt(a)),
    "sin": _in_double(np.sin),
    "cos": _in_double(np.cos),
    "tanh": _in_double(np.tanh),
}.items():
    _define(_name, _f)


@bound("fma")
def _fma(x: Instruction) -> Run:
    double = _in_double(lambda a, b, c: a * b + c)  # one rounding, of an almost exact sum
    exact = x.mods[-1] in ("f64", "f16", "f16x2")
    return _elementwise(x, (lambda a, b, c: a * b + c) if exact else double)


def _product(x: Instruction, sources: int) -> Run:
    """mul and mad: .lo, .hi, .wide, or of floats."""
    dtype, target, args = DTYPES[x.mods[-1]], x.args[0], x.args[1:]
    if "wide" in x.mods or ("hi" in x.mods and bits(dtype) == 32):
        wide, high = WIDER[dtype], "hi" in x.mods
        addend = dtype if high else wide

        def run(s: Any, mask: Any) -> None:
            p = np.asarray(s.get(args[0], dtype)).astype(wide) * np.asarray(s.get(args[1], dtype)).astype(wide)
            p = (p >> wide(32)).astype(dtype) if high else p
            s.put(target, p + s.get(args[2], addend) if sources == 3 else p, mask)

        return run
    if "hi" in x.mods:
        raise PtxError("64-bit mul.hi is not implemented")
    return _elementwise(x, (lambda a, b, c: a * b + c) if sources == 3 else np.multiply)


@bound("mul")
def _mul(x: Instruction) -> Run:
    return _product(x, 2)


@bound("mad")
def _mad(x: Instruction) -> Run:
    return _fma(x) if x.mods[-1][0] == "f" else _product(x, 3)


@bound("div")
def _div(x: Instruction) -> Run:
    if x.mods[-1][0] == "f":
        return _elementwise(x, np.divide)

    def divide(a: Any, b: Any) -> Any:  # towards zero; division by zero is undefined: 0 here
        b1 = np.where(b == 0, 1, b)
        q = np.abs(a) // np.abs(b1) * (np.sign(a) * np.sign(b1)) if x.mods[-1][0] == "s" else a // b1
        return np.where(b == 0, 0, q)

    return _elementwise(x, divide)


@bound("min", "max")
def _min_max(x: Instruction) -> Run:
    pick = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[x.op]["NaN" in x.mods]

    def f(first: Any, *rest: Any) -> Any:
        for v in rest:
            first = pick(first, v)
        return first

    return _elementwise(x, f)


@bound("and", "or", "xor", "not")
def _logic(x: Instruction) -> Run:
    f = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[x.op]
    target, reads = x.args[0], [reader(x.kernel, a, DTYPES[x.mods[-1]]) for a in x.args[1:]]
    return lambda s, mask: s.put(target, f(*[read(s) for read in reads]), mask)


@bound("shl", "shr")
def _shift(x: Instruction) -> Run:
    dtype, left = DTYPES[x.mods[-1]], x.op == "shl"
    width, fills = bits(dtype), x.mods[-1][0] == "s" and not left

    def run(s: Any, mask: Any) -> None:
        a, amount = s.get(x.args[1], dtype), np.asarray(s.get(x.args[2], U32)).astype(np.int64)
        clamped = np.minimum(amount, width - 1).astype(dtype)
        r = (a << clamped) if left else (a >> clamped)
        s.put(x.args[0], np.asarray(r if fills else np.where(amount >= width, dtype(0), r)).astype(dtype), mask)

    return run


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, floats: bool) -> Callable[[Any, Any], Any]:
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "ne" and floats:  # ordered
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    if name in _COMPARE:
        return _COMPARE[name]
    return lambda a, b: _COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)  # equ, neu, ltu, leu, gtu, geu


@bound("setp")
def _setp(x: Instruction) -> Run:
    kind, target = x.mods[-1], x.args[0]
    dtype, combine = DTYPES[kind], next((_COMBINE[q] for q in x.mods[1:-1] if q in _COMBINE), None)
    compare = _comparison(x.mods[0], kind[0] == "f" or kind == "bf16")

    first, second = (reader(x.kernel, q, dtype) for q in x.args[1:3])

    def run(s: Any, mask: Any) -> None:
        a, b = first(s), second(s)
        r = compare(bf16_to_f32(a), bf16_to_f32(b)) if kind == "bf16" else compare(a, b)
        other = s.get(x.args[3], np.bool_) if combine else None
        if target[0] == "pair":
            s.put(target[1], combine(r, other) if combine else r, mask)
            s.put(target[2], combine(~r, other) if combine else ~r, mask)
        else:
            s.put(target, combine(r, other) if combine else r, mask)

    return run


@bound("selp")
def _selp(x: Instruction) -> Run:
    dtype = RAW[bits(DTYPES[x.mods[-1]])]
    a, b, p = (reader(x.kernel, q, kind) for q, kind in zip(x.args[1:4], (dtype, dtype, np.bool_), strict=True))
    return lambda s, mask: s.put(x.args[0], np.where(p(s), a(s), b(s)), mask)


@bound("slct")
def _slct(x: Instruction) -> Run:
    dtype, control = RAW[bits(DTYPES[x.mods[-2]])], DTYPES[x.mods[-1]]
    a, b, c = x.args[1:4]
    return lambda s, mask: s.put(x.args[0], np.where(s.get(c, control) >= 0, s.get(a, dtype), s.get(b, dtype)), mask)
