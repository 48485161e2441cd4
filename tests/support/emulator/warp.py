"""Exchange between the lanes of a warp: shfl, vote, elect, redux, activemask."""

from __future__ import annotations

import numpy as np

from .errors import PtxError
from .machine import Machine, Mask, instruction
from .numbers import DTYPES, U32
from .parser import Instruction

LANE = np.arange(32)[None, :]


@instruction("shfl")
def _shfl(s: Machine, x: Instruction, mask: Mask) -> None:
    value = s.lanewise(x.args[1], U32).reshape(-1, 32)
    b, c = (s.lanewise(a, np.int32).reshape(-1, 32) for a in x.args[2:4])
    b, segment, clamp = b & 31, c >> 8 & 31, c & 31
    mode = x.mods[1]
    source = {
        "bfly": lambda: LANE ^ b,
        "down": lambda: LANE + b,
        "up": lambda: LANE - b,
        "idx": lambda: (LANE & segment) | (b & ~segment),
    }[mode]()
    last = (LANE & segment) | (clamp & ~segment)
    ok = source >= last if mode == "up" else source <= last
    source = np.where(ok, source, LANE)
    if mask is not None:
        lanes = mask.reshape(-1, 32)
        if not (np.take_along_axis(lanes, source, 1) | ~lanes).all():
            raise PtxError("shfl.sync reads from a lane that does not take part")
    out = np.take_along_axis(value, source, 1).reshape(-1)
    if x.args[0][0] == "pair":
        s.put(x.args[0][1], out, mask)
        s.put(x.args[0][2], np.broadcast_to(ok, value.shape).reshape(-1), mask)
    else:
        s.put(x.args[0], out, mask)


def _participants(s: Machine, mask: Mask) -> np.ndarray:
    return (np.ones(s.lanes, bool) if mask is None else mask).reshape(-1, 32)


@instruction("elect")
def _elect(s: Machine, x: Instruction, mask: Mask) -> None:
    lanes = _participants(s, mask)
    first = np.repeat(lanes.argmax(1), 32)
    s.put(x.args[0][1], first.astype(np.uint32), mask)
    s.put(x.args[0][2], np.tile(LANE[0], len(lanes)) == first, mask)


@instruction("vote")
def _vote(s: Machine, x: Instruction, mask: Mask) -> None:
    lanes = _participants(s, mask)
    p = s.lanewise(x.args[1], np.bool_).reshape(-1, 32)
    if x.mods[1] == "ballot":
        bits = ((p & lanes).astype(np.uint64) << LANE.astype(np.uint64)).sum(1).astype(np.uint32)
        s.put(x.args[0], np.repeat(bits, 32), mask)
    elif x.mods[1] in ("any", "all"):
        result = (p & lanes).any(1) if x.mods[1] == "any" else (p | ~lanes).all(1)
        s.put(x.args[0], np.repeat(result, 32), mask)
    else:
        raise PtxError("vote variant not implemented")


@instruction("activemask")
def _activemask(s: Machine, x: Instruction, mask: Mask) -> None:
    lanes = _participants(s, mask).astype(np.uint64) << LANE.astype(np.uint64)
    s.put(x.args[0], np.repeat(lanes.sum(1).astype(np.uint32), 32), mask)


@instruction("redux")
def _redux(s: Machine, x: Instruction, mask: Mask) -> None:
    s.whole_warps(mask)
    dtype = DTYPES[x.mods[-1]]
    reduce = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[x.mods[1]]
    if dtype is np.float32 and "NaN" not in x.mods:
        reduce = {"min": np.fmin, "max": np.fmax}[x.mods[1]]
    values = s.lanewise(x.args[1], dtype).reshape(-1, 32)
    s.put(x.args[0], np.repeat(reduce.reduce(values, 1).astype(dtype), 32), mask)
