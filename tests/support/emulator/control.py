"""Branches, exits and barriers of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import Deadlock
from .machine import CONTROL, Machine, Mask, instruction
from .numbers import U32
from .parser import Instruction


@dataclass
class Barrier:
    count: int  # threads it waits for; 0: all of the block that have not exited
    lanes: np.ndarray  # that arrived
    arrived: int = 0


def _diverge(s: Machine, targets: Any, mask: np.ndarray) -> bool:
    """The lanes of the group in `mask` go on at `targets`, its others at the next instruction."""
    s.pcs[slice(None) if s.mask is None else s.mask] = s.pc + 1
    s.pcs[mask] = targets
    s.regroup = s.stored = True
    return True


def _bra(s: Machine, x: Instruction, mask: Mask) -> bool:
    target = x.args[0][1]
    if x.pred is not None:
        taken = int(np.count_nonzero(mask))
        if taken == 0:
            s.pc += 1
            return True
        if taken < (s.lanes if s.mask is None else int(np.count_nonzero(s.mask))):
            return _diverge(s, target, mask)
    s.pc = target
    return True


def _brx(s: Machine, x: Instruction, mask: Mask) -> bool:
    targets = x.args[1][1]
    chosen = targets[np.clip(s.lanewise(x.args[0], U32).astype(np.int64), 0, len(targets) - 1)]
    mask = np.ones(s.lanes, bool) if mask is None else mask
    return _diverge(s, chosen[mask], mask)


def _exit(s: Machine, x: Instruction, mask: Mask) -> bool:
    leaving = np.ones(s.lanes, bool) if mask is None else mask
    s.alive = s.alive & ~leaving
    _diverge(s, s.pc + 1, leaving)
    for block, number in list(s.barriers):
        _try_release(s, block, number)
    return True


def _bar(s: Machine, x: Instruction, mask: Mask) -> bool:
    """bar / barrier .sync and .arrive, with a number of threads or for the whole block."""
    if x.mods and x.mods[0] == "warp":
        return False
    lanes = np.ones(s.lanes, bool) if mask is None else mask
    if not lanes.any():
        s.pc += 1
        return True
    arrive = "arrive" in x.mods
    numbers = s.lanewise(x.args[0], U32) if x.args else np.zeros(s.lanes, np.uint32)
    counts = s.lanewise(x.args[1], U32) if len(x.args) > 1 else np.zeros(s.lanes, np.uint32)
    count = int(counts[np.flatnonzero(lanes)[0]])
    alone = not arrive and not s.barriers and count in (0, s.threads) and (numbers == numbers[0]).all()
    if alone and np.array_equal(lanes, s.alive):  # the usual case: everybody at one barrier
        if s.races is not None:
            s.races.barrier(None)
        s.pc += 1
        return True
    for block, number in np.unique(np.stack([s.block_of[lanes], numbers[lanes]], 1), axis=0).tolist():
        mine = lanes & (s.block_of == block) & (numbers == number)
        waiting = s.barriers.setdefault((block, number), Barrier(int(counts[mine][0]), np.zeros(s.lanes, bool)))
        waiting.lanes |= mine
        waiting.arrived += int(mine.sum())
        if not arrive:
            s.blocked |= mine
        _try_release(s, block, number)
    s.pc += 1
    s.regroup = True
    return True


def _try_release(s: Machine, block: int, number: int) -> None:
    b = s.barriers[block, number]
    need = b.count or int(s.alive[block * s.threads : (block + 1) * s.threads].sum())
    if b.arrived > need > 0:
        raise Deadlock(f"barrier {number}: {b.arrived} threads arrived, it expects {need}")
    if b.arrived == need:
        s.blocked &= ~b.lanes
        if s.races is not None:
            s.races.barrier(np.unique(s.warp[b.lanes]))
        del s.barriers[block, number]


CONTROL.update({"bra": _bra, "brx": _brx, "ret": _exit, "exit": _exit, "bar": _bar, "barrier": _bar})


@instruction(
    "bar",
    "barrier",
    "membar",
    "fence",
    "griddepcontrol",
    "discard",
    "setmaxnreg",
    "nanosleep",
    "prefetch",
    "prefetchu",
    "applypriority",
)
def _nothing(s: Machine, x: Instruction, mask: Mask) -> None:
    """No effect here: bar.warp.sync, fences (accesses happen in order), hints."""
