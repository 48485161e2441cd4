"""Launching a Triton kernel: on the GPU its tensors are on, or wherever `execute_on` says (tests: an emulator).

Every `triton.py` of an op goes through `launch` and asks `target` for the machine, so that a test executes the
launcher's own code, grids and arguments included, on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from cibr_kernels.dispatch import pointers, triton_recording, triton_relaunch

# Arguments of kernels for whose value Triton must not compile anew (`do_not_specialize`): an epoch's last batch has
# another number of rows, and compiling takes seconds.  Widths and pitches are not among them: 16 divides them, and that
# makes loads vectors.
SIZES = [
    "n", "m", "rows", "others", "partners", "first", "end", "first_row", "first_positive", "shift", "g_shift", "strips",
    "strip_tiles", "col_tiles", "first_part", "first_block", "tiles", "blocks", "x_blocks", "row_blocks", "count",
    "panel", "panels", "panel_rows", "x_rows", "y_rows", "uw_rows", "bads", "wrongs", "shifts", "x_count", "y_count",
]  # fmt: skip

Grid = tuple[int, ...]
Named = dict[str, Any]  # arguments or constants of a kernel, by name
T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """What a launcher may know of a GPU."""

    kind: str  # "cuda" or "hip"
    capability: int  # 10 * major + minor for cuda: 80, 86, 89, 90, 100, 120; 0 for hip
    processors: int  # streaming multiprocessors / compute units
    shared_bytes: int  # shared memory that one block may ask for


class Executor(Protocol):
    def target(self, device: torch.device) -> Target: ...

    def launch(self, kernel: Any, grid: Grid, args: Named, constants: Named, options: dict[str, int]) -> None: ...


class Gpu:
    """The device the tensors are on, its current stream."""

    @staticmethod
    @lru_cache
    def target(device: torch.device) -> Target:
        found = torch.cuda.get_device_properties(device)
        names = ("shared_memory_per_block_optin", "shared_memory_per_block")
        told = [getattr(found, name) for name in names if hasattr(found, name)]
        shared = told[0] if told else _shared_by_triton(device)
        kind = "hip" if torch.version.hip else "cuda"
        capability = 10 * found.major + found.minor if kind == "cuda" else 0
        return Target(kind, capability, found.multi_processor_count, shared)

    @staticmethod
    def launch(kernel: Any, grid: Grid, args: Named, constants: Named, options: dict[str, int]) -> None:
        device = next(t.device for t in args.values() if isinstance(t, Tensor))
        if device.index == torch._C._cuda_getDevice():
            compiled = triton_relaunch.launch(kernel, grid, args, constants, options, device)
        else:
            with torch.cuda.device(device):
                compiled = triton_relaunch.launch(kernel, grid, args, constants, options, device)
        recorder = triton_recording.active()
        if recorder is not None:
            recorder.launched(compiled, grid, kernel, {**args, **constants})


def _shared_by_triton(device: torch.device) -> int:
    """What PyTorch 2.6 does not tell."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])


_gpu: Executor = Gpu()
_executor = ContextVar("where Triton launches go", default=_gpu)


@contextmanager
def holding(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Inside, `variable` has `value` in this thread."""
    before = variable.set(value)
    try:
        yield
    finally:
        variable.reset(before)


def execute_on(executor: Executor) -> AbstractContextManager[None]:
    """Launches of this thread go to `executor`, and CPU tensors count as its device's.  For tests."""
    return holding(_executor, executor)


def target(device: torch.device) -> Target:
    return _executor.get().target(device)


def launch(kernel: Any, grid: Grid, args: Named, constants: Named, *, num_warps: int = 4, num_stages: int = 2) -> None:
    """Runs a @triton.jit `kernel` over `grid`: args are tensors and numbers, constants its tl.constexpr parameters."""
    device = next(t.device for t in args.values() if isinstance(t, Tensor))
    pointers.check(getattr(kernel, "__name__", "a Triton kernel"), device, args)
    _executor.get().launch(kernel, grid, args, constants, {"num_warps": num_warps, "num_stages": num_stages})


def address(t: Tensor) -> int:
    """Where t starts; of a fake tensor, which lies nowhere, how far into its memory."""
    return t.data_ptr() if type(t) in (Tensor, torch.nn.Parameter) else int(t.storage_offset()) * t.element_size()


def unsupported(*tensors: Tensor) -> str | None:
    """Why Triton cannot run on these tensors; None when it can."""
    for t in tensors:
        if t.dtype.is_floating_point and t.dtype.itemsize > 4:
            return f"the Triton kernels compute in float32, got {t.dtype}"
        if t.device.type != "cuda" and isinstance(_executor.get(), Gpu):
            return f"the Triton kernels run on CUDA and ROCm devices, got {t.device}"
        found = target(t.device)
        if found.kind == "cuda" and found.capability < 80:
            return f"the Triton kernels need compute capability 8.0 or newer, got {found.capability / 10}"
    return _missing()


@lru_cache
def _missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not installed ({error})"
    return None
