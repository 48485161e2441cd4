"""Calling a C++ kernel: tensors become pointers, everything else a number, in the fields of its parameter struct."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import backends, pointers

CPU = torch.device("cpu")
NUMBERS = frozenset((int, float, bool, type(None)))
KEEP = 1 << 20  # bytes from which memory is worth keeping between calls
GRAIN = 1 << 21  # multiply-adds that are worth a thread: 20 to 40 us of one core
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common/dtype.h


def call(kernel: str, struct: str, work: int, fields: dict[str, Any]) -> None:
    """Fills `struct`'s fields and runs `kernel` on torch's number of threads, or fewer where there is little to do.

    fields: by name, all but "threads", which is added.  None and empty tensors stay null pointers
        (csrc/common/fields.h).
    work: about how many multiply-adds it is; results do not depend on the number of threads.
    """
    module = backends.compiled()
    for value in fields.values():
        if type(value) not in NUMBERS and not value.is_cpu:  # a tenth of the time of looking at each by name
            pointers.check(kernel, CPU, fields)
    fields["threads"] = max(1, min(torch.get_num_threads(), work // GRAIN))
    params = getattr(module, struct)()
    params.fill(fields)
    getattr(module, kernel)(params)


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty on the CPU, from memory that an earlier call gave back where it is large (csrc/common/scratch.h).

    Fresh pages cost more than a pass over them: the system clears each one.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < KEEP or not backends.native_available():
        return torch.empty(shape, dtype=dtype, device=device)
    memory = torch.frombuffer(backends.compiled().Scratch(size), dtype=torch.uint8)
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fill and torch.are_deterministic_algorithms_enabled():
        memory.fill_(0xFF)  # NaN in every floating dtype, as torch.empty would do
    return memory.view(dtype).view(shape)


def scratch_like(t: Tensor) -> Tensor:
    """`scratch` of the shape, dtype and device of `t`."""
    return torch.empty_like(t) if t.nbytes < KEEP else scratch(t.shape, t.dtype, t.device)
