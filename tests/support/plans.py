"""Executes what a CUDA launcher would launch: `_C.<kernel>_cuda_plan(params)` lists its kernels, grids and arguments.

    with plans.emulated("90a") as e: out = some_op(x_cpu, ..., backend="native")    # e.launches: (kernel, grid)

The launcher's pointers are those of CPU tensors and of a workspace; each becomes the buffer it points into, every part
of the workspace a buffer of its own, so that a kernel that runs over the end of one is reported.  Bytes of it that no
kernel wrote count as unknown, and reading them is reported too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import nvcc
import torch
from emulator import Kernel, launch
from executor import TARGETS, check_grid
from torch import Tensor

from cibr_kernels.dispatch import backends, cuda_call
from cibr_kernels.dispatch.triton_call import Target

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = {"additive_moments": "additive/moments", "additive_shifts": "additive/shifts"}  # kernel name's start: folder


@dataclass
class Emulator:
    """One emulated GPU.  `launches` collects (kernel name, grid) in order."""

    arch: str  # of nvcc.ARCHITECTURES
    launches: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    @property
    def capability(self) -> int:
        return int(self.arch.rstrip("a"))

    def target(self, device: torch.device) -> Target:
        return TARGETS[self.capability]

    def launch(self, kernel: str, params: Any, tensors: list[Tensor]) -> None:
        *tensors, workspace = tensors
        launches, sections = getattr(backends.compiled(), f"{kernel}_cuda_plan")(params)
        buffers = [_Buffer(_bytes(t), True) for t in tensors]
        whole = _bytes(workspace)
        buffers += [_Buffer(whole[offset : offset + size], False) for _, offset, size in sections]
        folder = next(SOURCES[start] for start in SOURCES if kernel.startswith(start))
        ptx = nvcc.compile_ptx(CSRC / folder / "cuda.cu", self.arch, include=[CSRC])
        for name, grid, threads, shared, arguments in launches:
            check_grid(name, grid)
            args, known = zip(*(_argument(a, buffers) for a in arguments), strict=True)
            launch(
                _kernel(ptx, name),
                grid,
                (threads,),
                args,
                known=known,
                dynamic_shared=shared,
                shared_limit=nvcc.SHARED_BYTES[self.capability],
            )
            self.launches.append((name, grid))


@contextmanager
def emulated(arch: str) -> Iterator[Emulator]:
    """Inside, `backend="native"` runs CPU tensors on an emulated GPU of this architecture."""
    emulator = Emulator(arch)
    with cuda_call.execute_on(emulator):
        yield emulator


class _Buffer:
    def __init__(self, values: np.ndarray, known: bool) -> None:
        self.values, self.known = values, np.full(len(values), known)
        self.first = values.ctypes.data
        self.last = self.first + len(values)


def _argument(argument: Any, buffers: list[_Buffer]) -> tuple[Any, np.ndarray | None]:
    """-> what the emulator takes, and which of its bytes are known.  Raises ValueError for a pointer to nothing."""
    if not isinstance(argument, tuple):
        return argument, None
    address = argument[1]
    if address == 0:
        return 0, None
    for b in buffers:
        if b.first <= address < b.last:
            return b.values[address - b.first :], b.known[address - b.first :]
    raise ValueError(f"the launcher passes {address:#x}, which is in no tensor of the call")


def _bytes(t: Tensor) -> np.ndarray:
    return t.detach().view(-1).view(torch.uint8).numpy()


@lru_cache(maxsize=256)
def _kernel(ptx: str, name: str) -> Kernel:
    return Kernel(ptx, name)
