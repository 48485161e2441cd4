"""What runs beside the threads: results in flight, cp.async, mbarriers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import MissingWait, PtxError


@dataclass
class Pending:
    """Register results of asynchronous instructions (wgmma, tcgen05.ld) that no wait has covered, per kind and warp.

    Reading or writing such a register before the wait is undefined; a `mov` only carries it along (compilers copy the
    registers of an inline-asm operand between the instruction and the wait).
    """

    registers: dict[int, set[tuple[str, int]]] = field(default_factory=dict)  # register: (kind, warp) that fill it
    open: dict[tuple[str, int], set[int]] = field(default_factory=dict)  # not committed
    groups: dict[tuple[str, int], list[tuple[set[int], Any]]] = field(default_factory=dict)  # committed, with a clock

    def start(self, kind: str, warps: np.ndarray, registers: set[int]) -> None:
        for w in warps.tolist():
            self.open.setdefault((kind, w), set()).update(registers)
            for r in registers:
                self.registers.setdefault(r, set()).add((kind, w))

    def commit(self, kind: str, warp: int, clock: Any = None) -> None:
        self.groups.setdefault((kind, warp), []).append((self.open.pop((kind, warp), set()), clock))

    def wait(self, kind: str, warp: int, left: int) -> list[Any]:
        """All groups but the last `left` are complete; returns their clocks."""
        groups = self.groups.get((kind, warp), [])
        done, self.groups[kind, warp] = groups[: max(0, len(groups) - left)], groups[max(0, len(groups) - left) :]
        still = set().union(self.open.get((kind, warp), set()), *(g[0] for g in self.groups[kind, warp]))
        for r in set().union(*(g[0] for g in done)) - still:
            owners = self.registers.get(r)
            if owners:
                owners.discard((kind, warp))
                if not owners:
                    del self.registers[r]
        return [clock for _, clock in done]

    def check(self, s: Any, x: Any, mask: Any) -> None:
        if x.op in ("wgmma", "tcgen05"):
            return
        warps = set(s.active_warps(mask).tolist())
        for r in sorted(x.registers & self.registers.keys()):
            for kind, w in sorted(self.registers[r]):
                if w not in warps:
                    continue
                if x.op == "mov":
                    targets = x.args[0][1] if x.args[0][0] == "vec" else [x.args[0]]
                    for target in targets:
                        self._carry(kind, w, r, target[1])
                    continue
                raise MissingWait(
                    f"a register that {kind} is still filling is used before its wait, by warp {w % s.warps_per_block}"
                )

    def _carry(self, kind: str, warp: int, source: int, target: int) -> None:
        self.registers.setdefault(target, set()).add((kind, warp))
        for group in [self.open.get((kind, warp), set()), *(g[0] for g in self.groups.get((kind, warp), []))]:
            if source in group:
                group.add(target)


@dataclass
class MBarrier:
    expected: int
    pending: int
    phase: int = 0  # completed phases
    bytes: int = 0  # in flight
    gathering: Any = 0  # clock of those who arrived in this phase
    clock: Any = 0  # of the last completed phase
    told: set[tuple[int, int]] = field(default_factory=set)  # (phase, warp) that asked once


def arrive(s: Any, key: tuple[int, int], count: int, transaction: int, actor: int | None) -> None:
    """`count` arrivals at the mbarrier (block in the batch, shared address), `transaction` more bytes to come."""
    b = s.mbarriers.get(key)
    if b is None:
        raise PtxError("arrive on an mbarrier that was not initialised")
    b.pending -= count
    b.bytes += transaction
    if actor is not None and s.races is not None:
        b.gathering = np.maximum(b.gathering, s.races.release(actor))
    if b.pending < 0:
        raise PtxError("more arrivals than the mbarrier expects")
    if b.pending == 0 and b.bytes == 0:
        b.pending, b.phase = b.expected, b.phase + 1
        b.clock, b.gathering = np.maximum(b.clock, b.gathering), 0
        if s.asleep.any():
            s.asleep[:] = False
            s.regroup = True
