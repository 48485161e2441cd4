"""What the emulator reports.  Every error names the PTX line, and the source line where the PTX has one."""

from __future__ import annotations


class PtxError(RuntimeError):
    """Base of all; itself: PTX that the emulator cannot run."""


class OutOfBounds(PtxError):
    """An access outside every buffer, outside the block's shared memory, or misaligned."""


class Uninitialised(PtxError):
    """A read of global memory that nothing wrote."""


class Race(PtxError):
    """Two accesses to the same bytes, at least one a write, that nothing orders."""


class Deadlock(PtxError):
    """Threads wait for a barrier that cannot complete, or run without end."""


class MissingWait(PtxError):
    """The result of an asynchronous instruction is used before it was waited for."""
