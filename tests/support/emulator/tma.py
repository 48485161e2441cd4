"""The tensor memory accelerator.  Tensor maps are dictionaries beside the emulated memory.

Keys are those of tensormap.replace: global_address, rank (minus one), elemtype, swizzle_mode, and box_dim, global_dim,
global_stride, each {index: value}.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import numpy as np

from .asynchronous import arrive
from .errors import OutOfBounds, PtxError
from .machine import Machine, Mask, instruction
from .memory import SHARED_WINDOW
from .numbers import RAW, U32, U64
from .parser import Instruction
from .tensor_core import Addresses, addresses

ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2}
SWIZZLE_SPAN = {0: 1 << 30, 1: 32, 2: 64, 3: 128}
SWIZZLE_BITS = {0: 0, 1: 1, 2: 3, 3: 7}


@instruction("tensormap")
def _tensormap(s: Machine, x: Instruction, mask: Mask) -> None:
    if x.mods[0] == "replace":
        name, address = x.mods[2], s.address(x.args[0])
        values = [s.lanewise(a, U64 if x.mods[-1] == "b64" else U32) for a in x.args[1:]]
        for lane in s.active(mask).tolist():
            fields = s.maps.setdefault(("shared", int(s.block_of[lane]), int(address[lane])), {})
            v = [int(q[lane]) for q in values]
            if len(v) == 2:
                fields.setdefault(name, {})[v[0]] = v[1]
            else:
                fields[name] = v[0]
    elif x.mods[0] == "cp_fenceproxy":
        target, source = s.address(x.args[0]), s.address(x.args[1])
        for lane in s.active(mask)[::32].tolist():
            s.maps[int(target[lane])] = copy.deepcopy(s.maps["shared", int(s.block_of[lane]), int(source[lane])])
    else:
        raise PtxError("tensormap variant not implemented")


def copy_tensor(s: Machine, x: Instruction, mask: Mask) -> None:
    """cp.async.bulk.tensor: a box of global memory to shared memory, or back."""
    loads = x.mods.index("global") > next(i for i, q in enumerate(x.mods) if q.startswith("shared"))
    shared_operand, map_operand = (x.args[0], x.args[1]) if loads else (x.args[1], x.args[0])
    target = s.address(shared_operand)
    base, coordinates = map_operand[1]
    maps = s.lanewise(base, U64)
    corner = [s.lanewise(c, np.int32) for c in coordinates]
    signal = s.address(x.args[2]) if loads else None
    for lane in s.active(mask).tolist():
        fields = s.maps.get(int(maps[lane]))
        if fields is None:
            raise PtxError("TMA with a tensor map that was not published")
        _copy_box(s, x, lane, fields, int(target[lane]) % SHARED_WINDOW, [int(c[lane]) for c in corner], loads, signal)


def _copy_box(
    s: Machine,
    x: Instruction,
    lane: int,
    fields: dict[str, Any],
    start: int,
    corner: list[int],
    loads: bool,
    signal: Any,
) -> None:
    size, rank, block = ELEMENT_BYTES[fields["elemtype"]], fields["rank"] + 1, int(s.block_of[lane])
    box = [fields["box_dim"][i] for i in range(rank)]
    stride = [size] + [fields["global_stride"][i] for i in range(rank - 1)]
    if start % 128:
        raise OutOfBounds("TMA shared address not 128-byte aligned")
    if box[0] * size > SWIZZLE_SPAN[fields["swizzle_mode"]]:
        raise PtxError("TMA box wider than the swizzle span")
    at, (a, words, lowest, highest) = _box(start, tuple(box), size, SWIZZLE_BITS[fields["swizzle_mode"]])
    inside = np.ones(at[0].shape, bool)
    offset = np.zeros(at[0].shape, np.int64)
    for i in range(rank):
        g = at[i] + corner[i]
        inside &= (g >= 0) & (g < fields["global_dim"][i])
        offset += g * stride[i]
    if lowest < 0 or highest + size > s.shared_bytes:
        raise OutOfBounds("TMA box outside shared memory")
    a = a + block * s.shared_width
    address = fields["global_address"] + offset[inside]
    lanes = np.full(address.shape, lane)
    try:
        index = s.memory.index(address, size, not loads, s.thread[lanes])
    except OutOfBounds as error:
        raise OutOfBounds(f"TMA box inside the tensor map's extents but not inside its memory: {error}") from None
    shared = s.shared[: s.shared.size // size * size].view(RAW[size * 8])
    memory = s.memory.bytes[: s.memory.bytes.size // size * size].view(RAW[size * 8])
    if s.conflicts is not None and loads:
        s.conflicts.read(index, size, s.grid_block[lanes], x)
    elif s.conflicts is not None:
        same = memory[index // size] == shared[a[inside] // size]
        s.conflicts.write(index, size, s.grid_block[lanes], same, x)
    if s.races is not None:
        unit = s.races.start(s.races.unit("tma", block), int(s.warp[lane]))
        s.races.access(words + block * s.shared_width, 4, loads, np.full(len(words), unit))
    if loads:
        values = np.zeros(a.shape, shared.dtype)  # zeros outside the extents
        values[inside] = memory[index // size]
        shared[a // size] = values
        actor = s.races.unit("tma", block) if s.races is not None else None
        arrive(s, (block, int(signal[lane]) % SHARED_WINDOW), 0, -a.size * size, actor)
    else:
        memory[index // size] = shared[a[inside] // size]


@lru_cache(maxsize=512)
def _box(start: int, box: tuple[int, ...], size: int, swizzle: int) -> tuple[list[np.ndarray], Addresses]:
    """Places in a box, the innermost dimension first, and where its elements lie from `start` of shared memory on."""
    at = np.meshgrid(*[np.arange(b) for b in reversed(box)], indexing="ij")[::-1]
    linear, count = np.zeros(at[0].shape, np.int64), 1
    for places, extent in zip(at, box, strict=True):
        linear += places * count
        count *= extent
    a = start + linear * size
    return list(at), addresses(a ^ (((a >> 7) & swizzle) << 4))
