"""Replayed plans: the launches of a direction of an op are recorded once and from then on made in one call of C++.

    outputs = plans.run(key, direction, inputs)        # direction(*inputs) -> tuple of tensors

A direction allocates, launches Triton kernels (`triton_call.launch`) and multiplies (`torch.mm(out=)`,
`torch.addmm(out=)` and their `dtype_out`).  It reads no tensor on the host, and its outputs are tensors of their own.
What it does may depend on shapes, dtypes and addresses modulo 16 of the inputs, and else on nothing that `key` does not
say.  One that does more than that is not replayed: it runs as it stands, every time, as without plans.

It also runs as it stands where plans do not serve (`_serve`), where somebody watches launches, and where the first call
of a key comes while a graph is captured.  No GPU has run a plan yet: docs/gpu.md.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import triton_call, triton_relaunch
from cibr_kernels.dispatch.plan import Plan
from cibr_kernels.dispatch.triton_recording import Recorder, Unknown, overlap

MOST = 64  # plans that are kept: the least recently used goes first
SWITCH = "CIBR_KERNELS_PLANS"  # 0: off; 1: with any Triton; unset: with those whose launches tests compare

Outputs = tuple[Tensor, ...]
_plans: OrderedDict[Hashable, Plan | str] = OrderedDict()  # or why there is none
_lock = threading.Lock()
_enabled = True


@contextmanager
def disabled() -> Iterator[None]:
    """Inside, nothing is replayed or recorded.  For measuring, and for doubt; not thread-safe."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def clear() -> None:
    """Forgets every plan."""
    with _lock:
        _plans.clear()


def kept() -> dict[Hashable, Plan | str]:
    """By key, the plan or the reason why there is none."""
    return dict(_plans)


def run(key: tuple[Hashable, ...], direction: Callable[..., Outputs], inputs: Sequence[Tensor]) -> Outputs:
    """direction(*inputs), replayed where it is known.  key: the direction's name and all else that it depends on."""
    device = inputs[0].device
    if not (_enabled and device.type == "cuda" and _serve()) or triton_relaunch.watched():
        return direction(*inputs)
    whole = (
        device.index, key, _settings(),
        *[v for t in inputs for v in (t.shape, t.dtype, t.data_ptr() % 16, t.is_contiguous())],
    )  # fmt: skip
    plan = _plans.get(whole)
    if plan.__class__ is Plan:
        _used(whole)
        if device.index == torch._C._cuda_getDevice():
            return plan.run(inputs)  # type: ignore[union-attr]
        with torch.cuda.device(device):
            return plan.run(inputs)  # type: ignore[union-attr]
    if plan is not None or torch.cuda.is_current_stream_capturing():
        return direction(*inputs)
    return _record(whole, direction, inputs, device)


def _settings() -> tuple[Any, ...]:
    """PyTorch's, which say what it would call of cuBLAS."""
    c = torch._C
    return (
        c._get_blas_preferred_backend(), c._get_cublas_allow_bf16_reduced_precision_reduction(),
        c._get_cublas_allow_fp16_reduced_precision_reduction(), c._cuda_tunableop_is_enabled(),
    )  # fmt: skip


def _used(whole: Hashable) -> None:
    with suppress(KeyError):  # another thread has let it go
        _plans.move_to_end(whole)


def _record(whole: Hashable, direction: Callable[..., Outputs], inputs: Sequence[Tensor], device: Any) -> Outputs:
    if overlap(inputs):  # a plan would not know which of them a launch means
        return direction(*inputs)
    with torch.cuda.device(device), Recorder(inputs) as seen:
        outputs = direction(*inputs)
    plan: Plan | str | None = seen.refusal if all(t.is_contiguous() for t in inputs) else "an input is not contiguous"
    if plan is None:
        try:
            plan = Plan(seen, outputs, device, _native())
        except Unknown as reason:
            plan = str(reason)
    with _lock:
        _plans[whole] = plan
        while len(_plans) > MOST:
            _plans.popitem(last=False)
    return outputs


@lru_cache
def _native() -> ModuleType | None:
    """The module of C++; None where it was not built."""
    try:
        return importlib.import_module("cibr_kernels._plans")
    except ImportError:
        return None


@lru_cache
def _serve() -> bool:
    """Whether plans are used in this process."""
    wanted = os.environ.get(SWITCH, "")
    if wanted == "0" or _native() is None or torch.version.hip or triton_call.unsupported():
        return False
    return wanted == "1" or triton_relaunch.is_compared()
