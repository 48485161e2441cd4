"""Races in shared and tensor memory, by vector clocks.

An actor is whatever runs on its own inside a block: every warp, and the units that work beside the warps: a "wgmma"
per warpgroup, one "tma" and one "tensor" (tcgen05.mma) per block.  clock[a, b] is the last moment of b that a is
ordered after.

Barriers join clocks, mbarriers carry them from those who arrive to those who wait, asynchronous units take the clock of
the warp that starts them and hand theirs back where the program waits for them.  An access is a race when the actor is
not ordered after the last write of the word (for a write: and after every read since).
"""

from __future__ import annotations

import numpy as np

from .errors import Race

TENSOR_PLACES = 4 * 512  # tensor memory of a block: four quarters of 32 lanes, 512 columns


class Races:
    """Of `blocks` blocks with `warps` warps and `width` bytes of shared memory each."""

    def __init__(self, blocks: int, warps: int, width: int, units: list[str]):
        self.warps, self.width = warps, width
        self.names = [f"warp {w}" for w in range(warps)]
        self.first: dict[str, int] = {}  # column of a kind of unit
        for unit in units:
            self.first[unit] = len(self.names)
            count = -(-warps // 4) if unit == "wgmma" else 1
            self.names += [f"{unit} of warpgroup {g}" if unit == "wgmma" else f"the {unit} unit" for g in range(count)]
        self.columns = len(self.names)
        self.shared_places = (width * blocks + 64) // 4
        places = self.shared_places + (TENSOR_PLACES * blocks if "tensor" in units else 0)
        self.writer = np.zeros(places, np.int16)
        self.written = np.zeros(places, np.int32)  # clock of the last write; 0: never, clocks start at 1
        self.read = np.zeros((places, self.columns), np.int32)
        self.clock = np.tile(np.eye(self.columns, dtype=np.int32), (blocks, 1))
        lanes_warp = np.arange(blocks * warps)
        self.of_warp = (lanes_warp // warps) * self.columns + lanes_warp % warps  # actor of a warp of the batch

    def unit(self, kind: str, block: int, number: int = 0) -> int:
        return block * self.columns + self.first[kind] + number

    def barrier(self, warps: np.ndarray | None) -> None:
        """The given warps (None: all, block by block) see one another's accesses."""
        if warps is None:
            blocks = self.clock.reshape(-1, self.columns, self.columns)
            w = np.arange(self.warps)
            blocks[:, : self.warps] = blocks[:, : self.warps].max(1, keepdims=True)
            blocks[:, w, w] += 1
        else:
            actors = self.of_warp[warps]
            self.clock[actors] = self.clock[actors].max(0)
            self.clock[actors, actors % self.columns] += 1

    def release(self, actor: int) -> np.ndarray:
        """The actor's clock, to hand to a synchronisation object; later accesses of the actor are not covered."""
        clock = self.clock[actor].copy()
        self.clock[actor, actor % self.columns] += 1
        return clock

    def acquire(self, actors: np.ndarray | int, clock: np.ndarray) -> None:
        self.clock[actors] = np.maximum(self.clock[actors], clock)

    def start(self, unit: int, warp: int) -> int:
        """A warp hands work to a unit: the unit is ordered after all that the warp is.  Returns the unit."""
        self.acquire(unit, self.clock[self.of_warp[warp]])
        return unit

    def access(self, address: np.ndarray, nbytes: int, write: bool, actors: np.ndarray) -> None:
        """Accesses of `nbytes` at batch-wide shared byte addresses by these actors; raises Race, then records them."""
        places = address >> 2
        if nbytes > 4:
            places = (places[:, None] + np.arange(nbytes // 4)).reshape(-1)
            actors = np.repeat(actors, nbytes // 4)
        self.touch(places, write, actors)

    def touch(self, places: np.ndarray, write: bool, actors: np.ndarray) -> None:
        flat, column = self.clock.reshape(-1), actors % self.columns
        start = actors * self.columns
        writer = self.writer[places]
        bad = self.written[places] > flat[start + writer]
        if bad.any():
            self._raise(places, actors, bad, writer, write, "written")
        if write:
            late = self.read[places] > self.clock[actors]
            if late.any():
                self._raise(places, actors, late.any(1), late.argmax(1), write, "read")
            self.writer[places], self.written[places] = column, flat[start + column]
        else:
            self.read[places, column] = flat[start + column]

    def tensor_places(self, block: int, quarters: np.ndarray | list[int], columns: np.ndarray) -> np.ndarray:
        start = self.shared_places + block * TENSOR_PLACES
        return (start + np.asarray(quarters)[:, None] * 512 + columns).reshape(-1)

    def _raise(
        self, places: np.ndarray, actors: np.ndarray, bad: np.ndarray, other: np.ndarray, write: bool, did: str
    ) -> None:
        i = int(np.flatnonzero(bad)[0])
        place = int(places[i])
        if place < self.shared_places:
            what = f"byte {place * 4 % self.width} of shared memory"
        else:
            what = f"column {(place - self.shared_places) % 512} of tensor memory"
        me = self.names[int(actors[i]) % self.columns]
        raise Race(
            f"race: {me} {'writes' if write else 'reads'} {what}, {did} by {self.names[int(other[i])]}: "
            "nothing orders them"
        )
