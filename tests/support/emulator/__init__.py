"""A functional PTX emulator on numpy: runs what Triton and nvcc compile for sm_80, 90, 100 and 120, on the CPU.

Written from the PTX ISA document; nothing here was compared with hardware.

    kernel = Kernel(ptx)                                     # parsed once
    launch(kernel, grid, block, [array, array, 3, 0.5])      # arrays are buffers: copied in and, after the run, back

Checked while running, each an exception that names the PTX line and the source line:
- OutOfBounds: global, shared, local and tensor memory; alignment; buffers lie 4 KiB of nothing apart; shared memory
  larger than the target's.
- Race in shared and tensor memory between warps and asynchronous units (cp.async, TMA, wgmma, tcgen05.mma), by vector
  clocks over bar, barrier, mbarrier and the wait instructions; two warps that store different values to one address
  in one instruction; and in global memory two blocks of a launch of which one writes what the other reads or writes.
- MissingWait: a register that wgmma or tcgen05.ld fills is touched before wgmma.wait_group or tcgen05.wait::ld.
- Uninitialised: reads of global bytes that nothing wrote, where the caller says which bytes are known.
- Deadlock: a barrier or mbarrier that cannot complete, more arrivals than it expects, endless loops.
- cp.async data lands as late as the program allows; shared and tensor memory start as NaN.

Not checked: time; proxy fences (fence.proxy.async) and memory fences, accesses take effect in order; races between
lanes of one warp (a missing __syncwarp), and between warps of one block in global memory; the order of a tensor core's
sums (float32 here) and its subnormals; the last bits of ex2, lg2, rcp and their kin (rounded once here); what ptxas
makes of the PTX; conflicts between blocks in accesses of single bytes.

Not implemented (an error): thread-block clusters, cta_group::2, fp8, integer and f16-accumulating mma, cp.async.bulk
without a tensor map, textures, device functions that are not inlined.  Data that one block hands to another by a flag
is reported as a conflict.  Shared memory is tracked in words of 4 bytes: two warps that write halves of one are
reported.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from . import (  # noqa: F401  (they register opcodes)
    arithmetic,
    control,
    conversions,
    copies,
    movement,
    tcgen05,
    tensor_core,
    tma,
    warp,
)
from .errors import Deadlock, MissingWait, OutOfBounds, PtxError, Race, Uninitialised
from .machine import Machine
from .memory import GlobalMemory
from .parser import Kernel

__all__ = [
    "Deadlock",
    "Kernel",
    "Machine",
    "MissingWait",
    "OutOfBounds",
    "PtxError",
    "Race",
    "Uninitialised",
    "launch",
]


def launch(
    kernel: Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    known: Sequence[np.ndarray | None] | None = None,
    shared: Collection[int] = (),
    **options: Any,
) -> Machine:
    """Runs a kernel.

    args: numpy arrays (buffers, updated in place), ints, floats, bytes (a structure), dicts (a tensor map, as in
        tma.py, whose global_address is the array).
    known: per argument the bytes that hold values, bool per byte, updated in place; None: all of them.
    shared: positions of the buffers that blocks may read and write as they like, without being reported.
    options: see Machine.  Raises the errors above; buffers are then unchanged.
    """

    def data(a: Any) -> np.ndarray | None:
        a = a.get("global_address") if isinstance(a, dict) else a
        return a if isinstance(a, np.ndarray) else None

    buffers = {i: b for i, a in enumerate(args) if (b := data(a)) is not None}
    memory = GlobalMemory([(b.ctypes.data, b.nbytes) for b in buffers.values()])
    values, known = list(args), known or [None] * len(args)
    for i, b in buffers.items():
        address = memory.fill(memory.place(b.ctypes.data, b.nbytes), b, known[i])
        values[i] = {**args[i], "global_address": address} if isinstance(args[i], dict) else address
    machine = Machine(kernel, memory, grid, block, values, **options)
    for i in shared if machine.conflicts is not None else ():
        machine.conflicts.exempt(memory.place(buffers[i].ctypes.data, buffers[i].nbytes))
    machine.run()
    for i, b in buffers.items():
        place, bytes_known = memory.place(b.ctypes.data, b.nbytes), known[i]
        b.reshape(-1).view(np.uint8)[:] = memory.bytes[place]
        if bytes_known is not None:
            bytes_known[:] = memory.known[place]
    return machine
