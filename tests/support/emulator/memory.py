"""Global memory with guards between buffers, and what every access to memory is checked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import OutOfBounds, PtxError, Race, Uninitialised
from .numbers import RAW

GUARD = 4096  # bytes of nothing around every buffer
BASE = 0x100000000  # address of the arena
SHARED_WINDOW, LOCAL_WINDOW = 0x7F0000000000, 0x7E0000000000  # generic addresses of shared and local memory


class GlobalMemory:
    """One flat arena that holds every buffer of a launch, 256-byte aligned, `GUARD` apart."""

    def __init__(self, ranges: list[tuple[int, int]]):
        """ranges: (pointer on the host, bytes) of every buffer.  Buffers that overlap there overlap here, and what a
        pointer is divisible by (to 256) stays."""
        merged: list[list[int]] = []
        for pointer, n in sorted(ranges):
            if merged and pointer < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], pointer + n)
            else:
                merged.append([pointer, pointer + n])
        self.hosts = np.array([m[0] for m in merged], np.int64)
        starts, top = [], GUARD
        for pointer, end in merged:
            starts.append(-(-top // 256) * 256 + pointer % 256)
            top = starts[-1] + end - pointer + GUARD
        self.bytes = np.zeros(-(-top // 256) * 256, np.uint8)
        self.starts = np.array(starts or [top], np.int64)
        self.ends = self.starts + np.array([end - pointer for pointer, end in merged] or [0])
        self.known = np.zeros(len(self.bytes), np.bool_)  # bytes that something wrote
        self.all_known = True

    def place(self, pointer: int, nbytes: int) -> slice:
        """Where a buffer of the host lies in the arena."""
        number = int(np.searchsorted(self.hosts, pointer, "right")) - 1
        start = int(self.starts[number]) + pointer - int(self.hosts[number])
        return slice(start, start + nbytes)

    def fill(self, place: slice, values: np.ndarray, known: np.ndarray | None) -> int:
        """Copies a buffer in; returns its address.  known: bool per byte, None for all."""
        self.bytes[place] = values.reshape(-1).view(np.uint8)
        self.known[place] = True if known is None else known
        self.all_known &= known is None
        return BASE + place.start

    def index(self, address: np.ndarray, nbytes: int, write: bool, thread: np.ndarray) -> np.ndarray:
        """Offsets in the arena of accesses that active lanes make.  Raises OutOfBounds, Uninitialised."""
        i = address - BASE
        if (i % nbytes).any():
            bad = np.flatnonzero(i % nbytes)[0]
            raise OutOfBounds(
                f"global access of {nbytes} B at {hex(int(address[bad]))} is misaligned, thread {int(thread[bad])}"
            )
        buffer = np.searchsorted(self.starts, i, "right") - 1
        ok = (buffer >= 0) & (i + nbytes <= self.ends[buffer])
        if not ok.all():
            bad = int(np.flatnonzero(~ok)[0])
            raise OutOfBounds(
                f"global {'store' if write else 'load'} of {nbytes} B at {self._place(int(i[bad]))}: out of bounds, "
                f"thread {int(thread[bad])}, {int((~ok).sum())} lanes"
            )
        if not self.all_known:
            self._check_known(i, nbytes, write, buffer)
        return i

    def _place(self, i: int) -> str:
        for number, (start, end) in enumerate(zip(self.starts, self.ends, strict=True)):
            if start - GUARD <= i < end + GUARD:
                return f"byte {int(i - start)} of buffer {number} ({int(end - start)} B)"
        return f"the wild address {hex(i + BASE)}"

    def _check_known(self, i: np.ndarray, nbytes: int, write: bool, buffer: np.ndarray) -> None:
        word = min(nbytes, 8)  # bytes are looked at together: as many as an access of them is aligned to
        known, ones = self.known.view(RAW[8 * word]), RAW[8 * word](int.from_bytes(b"\1" * word, "little"))
        places = [i // word + part for part in range(nbytes // word)]
        if write:
            for at in places:
                known[at] = ones
        elif not (known := np.logical_and.reduce([known[at] == ones for at in places])).all():
            bad = int(np.flatnonzero(~known)[0])
            raise Uninitialised(f"read of {self._place(int(i[bad]))}, which nothing wrote, {int((~known).sum())} lanes")


def load(s: Any, address: np.ndarray, dtype: Any, mask: Any, count: int, space: str) -> list[np.ndarray]:
    """`count` consecutive values of every lane; lanes outside the mask get anything."""
    size = np.dtype(dtype).itemsize
    if space == "global":
        index = global_index(s, address, size * count, mask, False)
        values = s.memory.bytes[: s.memory.bytes.size // size * size].view(dtype)
    elif space == "shared":
        index = shared_index(s, address, size * count, mask)
        race(s, index, size * count, mask, False)
        values = s.shared.view(dtype)
    else:
        index = local_index(s, address, size * count, mask)
        values = s.local.view(dtype)
    first = index // size
    return [values[first + j] if j else values[first] for j in range(count)]


def store(s: Any, address: np.ndarray, dtype: Any, values: list[Any], mask: Any, space: str) -> None:
    size = np.dtype(dtype).itemsize
    total = size * len(values)
    if space == "global":
        index, into = global_index(s, address, total, mask, True), s.memory.bytes
    elif space == "shared":
        index, into = shared_index(s, address, total, mask), s.shared
        race(s, index, total, mask, True)
    else:
        index, into = local_index(s, address, total, mask), s.local
    typed = into[: into.size // size * size].view(dtype)
    first = (index if mask is None else index[mask]) // size
    own = [np.broadcast_to(v, (s.lanes,)) if mask is None else np.broadcast_to(v, (s.lanes,))[mask] for v in values]
    if space == "global" and s.conflicts is not None:
        same = np.logical_and.reduce([typed[first + j] == v for j, v in enumerate(own)])
        s.conflicts.write(first * size, total, s.grid_block if mask is None else s.grid_block[mask], same, s.current)
    for j, v in enumerate(own):
        typed[first + j] = v
        lost = typed[first + j] != v
        if lost.any() and space != "local":
            _check_lost(s, first, lost, mask, space)


def _check_lost(s: Any, place: np.ndarray, lost: np.ndarray, mask: Any, space: str) -> None:
    """Raises if lanes of different warps (in global memory: any lanes) store different values to one place at once.

    Within a warp the hardware picks a lane, and Triton lets it: lanes of a reduction may differ in the last bit where a
    product was fused into the first sum.
    """
    who = s.active(mask) if space == "global" else s.warp[s.active(mask)]
    for p in np.unique(place[lost]):
        if len(np.unique(who[place == p])) > 1:
            raise Race(f"conflict: two threads store different values to the same {space} bytes in one instruction")


def space_of(mods: list[str], address: np.ndarray) -> str:
    """global, shared or local: named by the instruction, or by the window that a generic address is in."""
    named = mods[0].split("::")[0] if mods else ""
    if named in ("global", "shared", "local"):
        return named
    if address[0] >= SHARED_WINDOW:
        return "shared"
    return "local" if address[0] >= LOCAL_WINDOW else "global"


def global_index(s: Any, address: np.ndarray, nbytes: int, mask: Any, write: bool) -> np.ndarray:
    if mask is None:
        active, thread, block = address, s.thread, s.grid_block
    else:
        active, thread, block = address[mask], s.thread[mask], s.grid_block[mask]
    index = s.memory.index(active, nbytes, write, thread)
    if s.conflicts is not None and not write:
        s.conflicts.read(index, nbytes, block, s.current)
    if mask is None:
        return index
    full = np.full(s.lanes, GUARD, np.int64)
    full[mask] = index
    return full


def shared_index(s: Any, address: np.ndarray, nbytes: int, mask: Any) -> np.ndarray:
    """Byte offsets in the shared memory of the whole batch."""
    a = np.where(address >= SHARED_WINDOW, address - SHARED_WINDOW, address)
    bad = (a < 0) | (a + nbytes > s.shared_bytes) | (a % nbytes != 0)
    if mask is not None:
        bad &= mask
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise OutOfBounds(
            f"shared access of {nbytes} B at {int(a[i])} of {s.shared_bytes} B is out of bounds or misaligned: thread "
            f"{int(s.thread[i])}, {int(bad.sum())} lanes"
        )
    a = a + s.block_offset
    return a if mask is None else np.where(mask, a, 0)


def local_index(s: Any, address: np.ndarray, nbytes: int, mask: Any) -> np.ndarray:
    if s.kernel.local is None:
        raise PtxError("local memory was not declared")
    a = np.where(address >= LOCAL_WINDOW, address - LOCAL_WINDOW, address)
    bad = (a < 0) | (a + nbytes > s.kernel.local[1]) | (a % nbytes != 0)
    if mask is not None:
        bad &= mask
    if bad.any():
        raise OutOfBounds(f"local access of {nbytes} B at {int(a[np.flatnonzero(bad)[0]])} of {s.kernel.local[1]} B")
    a = a + np.arange(s.lanes) * s.local_stride
    return a if mask is None else np.where(mask, a, 0)


def race(s: Any, index: np.ndarray, nbytes: int, mask: Any, write: bool) -> None:
    """Shared accesses of the active lanes by their warps."""
    if s.races is not None:
        if mask is None:
            s.races.access(index, nbytes, write, s.actor)
        else:
            s.races.access(index[mask], nbytes, write, s.actor[mask])
