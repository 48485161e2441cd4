"""cp.async (per-thread copies from global to shared memory) and mbarrier instructions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .asynchronous import MBarrier, arrive
from .errors import PtxError
from .machine import Machine, Mask, instruction
from .memory import SHARED_WINDOW, load, race, shared_index
from .numbers import U32
from .parser import Instruction
from .tma import copy_tensor


@dataclass
class Copy:
    """One cp.async instruction in flight: per lane where it goes, its words (words, lanes) and its group."""

    target: np.ndarray
    data: np.ndarray
    lanes: np.ndarray
    group: np.ndarray

    def of(self, some: np.ndarray) -> Copy:
        return Copy(self.target[some], self.data[:, some], self.lanes[some], self.group[some])


@instruction("cp")
def _cp(s: Machine, x: Instruction, mask: Mask) -> None:
    if "bulk" in x.mods:
        _bulk(s, x, mask)
    elif "commit_group" in x.mods:
        s.copy_groups[s.active_warps(mask)] += 1
    elif "wait_all" in x.mods or "wait_group" in x.mods:
        warps = s.active_warps(mask)
        s.copy_groups[warps] += "wait_all" in x.mods
        complete = np.zeros(len(s.copy_groups), np.int64)
        complete[warps] = s.copy_groups[warps] - (x.args[0][1] if x.args else 0)
        s.copies = [rest for copy in s.copies if (rest := _land(s, copy, complete)) is not None]
    elif x.mods[0] == "async" and "mbarrier" not in x.mods:
        _start(s, x, mask)
    else:
        raise PtxError("cp variant not implemented")


def _start(s: Machine, x: Instruction, mask: Mask) -> None:
    """Reads the source now; the destination changes when the group is waited for, as late as the hardware may."""
    nbytes = x.args[2][1]
    target = shared_index(s, s.address(x.args[0]), nbytes, mask)
    size = s.lanewise(x.args[3], np.int32).astype(np.int64) if len(x.args) > 3 else np.full(s.lanes, nbytes)
    reading = (size > 0) if mask is None else (size > 0) & mask
    data = [np.zeros(s.lanes, np.uint32) for _ in range(nbytes // 4)]
    if reading.any():
        if not ((size == nbytes) | (size == 0))[reading].all():
            raise PtxError("cp.async that copies a part of its bytes is not implemented")
        values = load(s, s.address(x.args[1]), np.uint32, None if reading.all() else reading, nbytes // 4, "global")
        data = [np.where(reading, v, U32(0)) for v in values]
    race(s, target, nbytes, mask, True)
    lanes = s.active(mask)
    group = s.copy_groups[s.warp[lanes]]
    s.copies.append(Copy(target[lanes], np.stack([d[lanes] for d in data]), lanes, group))


def _land(s: Machine, copy: Copy, complete: np.ndarray) -> Copy | None:
    """Writes what belongs to groups below `complete` (per warp); returns the rest, None if there is none."""
    ready = copy.group < complete[s.warp[copy.lanes]]
    if not ready.any():
        return copy
    rest = None
    if not ready.all():
        rest, copy = copy.of(~ready), copy.of(ready)
    if s.races is not None:
        s.races.access(copy.target, 4 * len(copy.data), True, s.actor[copy.lanes])
    words = s.shared.view(np.uint32)
    for q, d in enumerate(copy.data):
        words[copy.target // 4 + q] = d
    return rest


def _bulk(s: Machine, x: Instruction, mask: Mask) -> None:
    """Tensor copies; groups of copies out of shared memory, whose source may be overwritten after the wait."""
    if "commit_group" in x.mods or "wait_group" in x.mods:
        for w in s.active_warps(mask).tolist():
            if "commit_group" in x.mods:
                clock = s.races.release(s.races.unit("tma", w // s.warps_per_block)) if s.races else None
                s.pending.commit("tma", w, clock)
            else:
                for clock in s.pending.wait("tma", w, x.args[0][1]):
                    if s.races is not None:
                        s.races.acquire(s.races.of_warp[w], clock)
    elif "tensor" in x.mods:
        copy_tensor(s, x, mask)
    else:
        raise PtxError("cp.async.bulk without a tensor map is not implemented")


@instruction("mbarrier")
def _mbarrier(s: Machine, x: Instruction, mask: Mask) -> None:
    kind = x.mods[0]
    if kind in ("try_wait", "test_wait"):
        _wait(s, x, mask)
        return
    memory = next(a for a in x.args if a[0] == "mem")
    address = s.address(memory)
    operand = x.args[-1] if x.args[-1] is not memory else None
    amount = s.lanewise(operand, U32) if operand is not None else None
    for lane in s.active(mask).tolist():
        key = (int(s.block_of[lane]), int(address[lane]) % SHARED_WINDOW)
        n = int(amount[lane]) if amount is not None else 1
        if kind == "init":
            s.mbarriers[key] = MBarrier(n, n)
        elif kind == "inval":
            s.mbarriers.pop(key, None)
        elif kind == "arrive":
            expect = "expect_tx" in x.mods
            arrive(s, key, 1 if expect else n, n if expect else 0, int(s.actor[lane]))
        elif kind == "expect_tx":
            arrive(s, key, 0, n, None)
        else:
            raise PtxError("mbarrier variant not implemented")


def _wait(s: Machine, x: Instruction, mask: Mask) -> None:
    """Says no to every warp once, as it may, so that a program which does not ask again is found to race."""
    if "parity" not in x.mods:
        raise PtxError("mbarrier waits are implemented by parity only")
    address, parity = s.address(x.args[1]) % SHARED_WINDOW, s.lanewise(x.args[2], U32) & 1
    lanes = s.active(mask)
    done, sleeping = np.zeros(s.lanes, bool), np.zeros(s.lanes, bool)
    places, which = np.unique((s.block_of[lanes] << 40) | (address[lanes] << 1) | parity[lanes], return_inverse=True)
    for i, place in enumerate(places.tolist()):
        b = s.mbarriers.get((place >> 40, (place >> 1) & 0x7FFFFFFFFF))
        if b is None:
            raise PtxError("wait on an mbarrier that was not initialised")
        mine = lanes[which == i]
        if (b.phase & 1) == (place & 1):
            sleeping[mine] = True
            continue
        told = {w for w in np.unique(s.warp[mine]).tolist() if (b.phase, w) in b.told}
        b.told |= {(b.phase, w) for w in np.unique(s.warp[mine]).tolist()}
        mine = mine[np.isin(s.warp[mine], list(told))]
        done[mine] = True
        if s.races is not None:
            s.races.acquire(np.unique(s.actor[mine]), b.clock)
    if x.mods[0] == "try_wait" and sleeping.any():
        s.asleep |= sleeping
        s.regroup = True
    s.put(x.args[0], done, mask)
