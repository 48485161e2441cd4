"""Conflicts between blocks in global memory: one block writes what another writes or reads, in the same launch.

Nothing orders the blocks of a launch, so this is an error, even where the result happens to be right; atomics are
exempt, and blocks that write one and the same value are only noted (`duplicates`).  Reads are collected and compared
with all writes when the launch ends, so that the order in which the emulator runs blocks does not matter.
Granularity: 2 bytes; accesses of single bytes are not tracked.
"""

from __future__ import annotations

import numpy as np

from .errors import Race
from .parser import Instruction

NOBODY, ANYBODY = np.int16(-1), np.int16(-2)
BLOCK_IDS = 32749  # blocks are numbered modulo this prime
LIMIT = 1 << 25  # recorded reads (of one access each) kept before those of buffers not written so far are dropped


class Conflicts:
    """One launch over an arena of `size` bytes."""

    def __init__(self, size: int):
        self.owner = np.full(size // 2, NOBODY, np.int16)
        self.reads: list[tuple[np.ndarray, int, np.ndarray, Instruction]] = []
        self.recorded = 0
        self.low, self.high = size, 0  # range of the written bytes
        self.duplicates: set[str] = set()  # where a block wrote the value that another had written: harmless, and waste

    def exempt(self, place: slice) -> None:
        """Bytes of the arena that blocks may touch as they like."""
        self.owner[place.start // 2 : -(-place.stop // 2)] = ANYBODY

    def write(self, index: np.ndarray, nbytes: int, blocks: np.ndarray, same: np.ndarray, at: Instruction) -> None:
        """Stores of `nbytes` at byte offsets `index` of the arena by `blocks` (numbers in the grid).

        same: whether the bytes already had the value.  Two stores of different values in one call are not seen here.
        """
        if nbytes < 2 or not len(index):
            return
        places, mine = self._spread(index, nbytes, blocks)
        before = self.owner[places]
        self.owner[places] = mine
        twice = (before != mine) & (before != NOBODY) | (self.owner[places] != mine)
        if twice.any():
            changed = twice & (before >= 0) & (before != mine) & ~np.repeat(same, nbytes // 2)
            if changed.any():
                i = int(np.flatnonzero(changed)[0])
                raise Race(
                    f"conflict: blocks {before[i]} and {mine[i]} of one launch write the same bytes of global memory"
                )
            self.owner[places[twice]] = ANYBODY
            if (before[twice] != ANYBODY).any():
                self.duplicates.add(at.where())
        self.low, self.high = min(self.low, int(index.min())), max(self.high, int(index.max()) + nbytes)

    def read(self, index: np.ndarray, nbytes: int, blocks: np.ndarray, at: Instruction) -> None:
        if nbytes < 2 or not len(index):
            return
        self.reads.append((index, nbytes, blocks.astype(np.int16), at))
        self.recorded += len(index)
        if self.recorded > LIMIT:
            self.reads = [r for r in self.reads if self._overlaps(r)]
            self.recorded = sum(len(r[0]) for r in self.reads) // 2

    def finish(self) -> None:
        """Raises Race if a block read what another block wrote."""
        for index, nbytes, blocks, at in filter(self._overlaps, self.reads):
            places, mine = self._spread(index, nbytes, blocks)
            owner = self.owner[places]
            bad = (owner >= 0) & (owner != mine)
            if bad.any():
                i = int(np.flatnonzero(bad)[0])
                raise Race(
                    f"conflict: block {mine[i]} reads bytes of global memory that block {owner[i]} of the same "
                    f"launch writes\n  at {at.where()}"
                )

    def _overlaps(self, read: tuple[np.ndarray, int, np.ndarray, Instruction]) -> bool:
        return int(read[0].min()) < self.high and int(read[0].max()) + read[1] > self.low

    @staticmethod
    def _spread(index: np.ndarray, nbytes: int, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mine = (blocks % BLOCK_IDS).astype(np.int16)
        if nbytes == 2:
            return index >> 1, mine
        return ((index >> 1)[:, None] + np.arange(nbytes // 2)).reshape(-1), np.repeat(mine, nbytes // 2)
