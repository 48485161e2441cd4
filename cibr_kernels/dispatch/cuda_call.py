"""Calling a CUDA C++ kernel: a parameter struct with device pointers, a workspace, the device and its current stream.

`execute_on` puts something else in the device's place: tests run the launcher's own plan in an emulator on CPU tensors.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from cibr_kernels.dispatch import backends, pointers, triton_recording
from cibr_kernels.dispatch.triton_call import Gpu, Target, holding


class Executor(Protocol):
    def target(self, device: torch.device) -> Target: ...

    def refusal(self, device: torch.device) -> str: ...

    def launch(self, kernel: str, params: Any, tensors: list[Tensor]) -> None: ...


class Device:
    """The CUDA device the tensors are on, its current stream."""

    @staticmethod
    def target(device: torch.device) -> Target:
        return Gpu.target(device)

    @staticmethod
    @lru_cache
    def refusal(device: torch.device) -> str:
        """Why the module cannot run there, "" when it can: the driver may be older than what it was built with."""
        return str(backends.compiled().cuda_refusal(device.index))

    @staticmethod
    def launch(kernel: str, params: Any, tensors: list[Tensor]) -> None:
        device = tensors[0].device
        params.device = device.index
        params.stream = torch.cuda.current_stream(device).cuda_stream
        with torch.cuda.device(device):
            getattr(backends.compiled(), f"{kernel}_cuda")(params)


_device: Executor = Device()
_executor = ContextVar("where calls of CUDA C++ go", default=_device)


def execute_on(executor: Executor) -> AbstractContextManager[None]:
    """Calls of this thread go to `executor`, and CPU tensors count as its device's.  For tests."""
    return holding(_executor, executor)


def takes(*tensors: Tensor) -> bool:
    """True when these tensors are for the CUDA kernels rather than those of the CPU."""
    return tensors[0].device.type == "cuda" or not isinstance(_executor.get(), Device)


def target(device: torch.device) -> Target:
    return _executor.get().target(device)


def unsupported(*tensors: Tensor) -> str | None:
    """Why the CUDA C++ kernels cannot run on these tensors; None when they can."""
    missing = backends.cuda_missing()
    if missing:
        return missing
    for t in tensors:
        if t.dtype.is_floating_point and t.dtype.itemsize > 4:
            return f"the CUDA kernels compute in float32, got {t.dtype}"
        if t.device.type == "cuda" and Gpu.target(t.device).kind != "cuda":
            return "the CUDA C++ kernels run on NVIDIA devices"
        if t.device.type == "cuda" and Gpu.target(t.device).capability < 80:
            return f"the CUDA kernels need compute capability 8.0 or newer, got {Gpu.target(t.device).capability / 10}"
        if t.device.type == "cuda" and (refusal := _executor.get().refusal(t.device)):
            return f"the CUDA C++ kernels cannot run on {t.device}: {refusal}"
    return None


def call(kernel: str, struct: str, fields: dict[str, Any]) -> None:
    """Fills `struct` and enqueues `kernel` on the current stream.  None and empty tensors become null."""
    module = backends.compiled()
    tensors = [v for v in fields.values() if isinstance(v, Tensor) and v.numel()]
    pointers.check(kernel, tensors[0].device, fields)
    params = getattr(module, struct)()
    params.fill(fields)
    size = getattr(module, f"{kernel}_cuda_workspace")(params)
    workspace = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
    params.workspace = workspace.data_ptr()
    _executor.get().launch(kernel, params, [*tensors, workspace])
    recorder = triton_recording.active()
    if recorder is not None:
        recorder.called(kernel, struct, {**fields, "workspace": workspace})


def again(kernel: str, struct: str, fields: dict[str, Any], like: Tensor) -> None:
    """A call that was made before, with addresses in the place of tensors, on the device of `like`."""
    params = getattr(backends.compiled(), struct)()
    params.fill(fields)
    _executor.get().launch(kernel, params, [like])
