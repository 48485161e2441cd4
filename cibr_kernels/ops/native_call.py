"""Calling a C++ kernel: tensors become pointers, everything else a number, in the fields of its parameter struct."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cibr_kernels import backends

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common/dtype.h


def call(kernel: str, struct: str, **fields: Any) -> None:
    """Fills `struct`'s fields and runs `kernel` on torch's number of threads.  None and empty tensors become null."""
    module = backends.compiled()
    params = getattr(module, struct)()
    params.threads = torch.get_num_threads()
    for name, value in fields.items():
        if isinstance(value, Tensor):
            assert value.is_contiguous(), name
            value = value.data_ptr() if value.numel() else 0
        setattr(params, name, 0 if value is None else value)
    getattr(module, kernel)(params)
