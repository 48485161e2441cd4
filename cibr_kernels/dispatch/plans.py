"""Replayed plans: the launches of a direction of an op are recorded once and from then on made in one call of C++.

    outputs = plans.run(key, direction, inputs)        # direction(*inputs) -> tuple of tensors

A direction allocates, launches Triton kernels (`triton_call.launch`) and multiplies (`torch.mm(out=)`,
`torch.addmm(out=)` and their `dtype_out`).  It reads no tensor on the host, and its outputs are tensors of their own.
What it does may depend on shapes, dtypes and addresses modulo 16 of the inputs, and else on nothing that `key` does not
say.  One that does more than that is not replayed: it runs as it stands, every time, as without plans.

It also runs as it stands where plans do not serve (`refusal`), where somebody watches launches, and where the first
call of a key comes while a graph is captured.  No GPU has run a plan yet: docs/gpu.md.
"""

from __future__ import annotations

import importlib
import itertools
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import triton_call, triton_relaunch
from cibr_kernels.dispatch.plan import Plan
from cibr_kernels.dispatch.triton_recording import Recorder, Unknown, active, overlap

MOST = 64  # plans that are kept: the least recently used goes first
SWITCH = "CIBR_KERNELS_PLANS"  # 0: off; 1: with any Triton; unset: with those whose launches tests compare

Outputs = tuple[Tensor, ...]
_plans: dict[Hashable, Plan | str] = {}  # or why there is none
_clock = itertools.count(1)
_lock = threading.Lock()
_replays = triton_relaunch.Switch()


def disabled() -> AbstractContextManager[None]:
    """Inside, nothing is replayed or recorded.  For measuring, and for doubt; not thread-safe."""
    return _replays.off()


def clear() -> None:
    """Forgets every plan."""
    with _lock:
        for plan in _plans.values():
            if isinstance(plan, Plan):
                plan.kept = False
        _plans.clear()


def kept() -> dict[Hashable, Plan | str]:
    """By key, the plan or the reason why there is none."""
    return dict(_plans)


def find(key: tuple[Hashable, ...], inputs: Sequence[Tensor]) -> Plan | None:
    """The plan that `run` would replay; None where it would not.  That there is one says that such a call was made."""
    if not (_replays.on and inputs[0].is_cuda and refusal() is None) or triton_relaunch.watched():
        return None
    plan = _plans.get(_whole(key, inputs))
    if plan.__class__ is not Plan or not _fits(plan):  # type: ignore[arg-type]
        return None
    plan.last_use = next(_clock)  # type: ignore[union-attr]
    return plan  # type: ignore[return-value]


def origin(plan: Plan | None) -> Plan | None:
    """For `run_after`: the plan, unless somebody's hooks may give back other tensors than are saved for a backward."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # PyTorch 2.6 does not say
    return plan if top is not None and top(True) is None else None


def run_after(
    first: Plan | None, key: tuple[Hashable, ...], direction: Callable[..., Outputs], inputs: Sequence[Tensor], new: int
) -> Outputs:
    """`run` of a direction after `first`, the plan of another: but for the first `new` all of `inputs` are inputs or
    outputs of its replay.  So what they are need not be asked again."""
    if first is None:
        return run(key, direction, inputs)
    told = _whole(key, inputs[:new])
    plan = first.after.get(told)
    if plan is not None and plan.kept and _replays.on and _fits(plan) and not triton_relaunch.watched():
        plan.last_use = next(_clock)
        return replay(plan, inputs)
    outputs = run(key, direction, inputs)
    found = _plans.get(_whole(key, inputs))
    if isinstance(found, Plan):
        first.after[told] = found
    return outputs


def replay(plan: Plan, inputs: Sequence[Tensor]) -> Outputs:
    """What the plan that was found for these inputs gives."""
    if plan.index == torch._C._cuda_getDevice():
        return plan.run(inputs)
    with torch.cuda.device(plan.device):
        return plan.run(inputs)


def run(key: tuple[Hashable, ...], direction: Callable[..., Outputs], inputs: Sequence[Tensor]) -> Outputs:
    """direction(*inputs), replayed where it is known.  key: the direction's name and all else that it depends on."""
    if active() is not None:  # part of what is recorded
        return direction(*inputs)
    plan = find(key, inputs)
    if plan is not None:
        return replay(plan, inputs)
    device = inputs[0].device
    serves = _replays.on and device.type == "cuda" and refusal() is None and not triton_relaunch.watched()
    whole = _whole(key, inputs)
    if not serves or isinstance(_plans.get(whole), str) or torch.cuda.is_current_stream_capturing():
        return direction(*inputs)
    return _record(whole, direction, inputs, device)


def _whole(key: tuple[Hashable, ...], inputs: Sequence[Tensor]) -> Hashable:
    """All that a direction may depend on."""
    found: list[Hashable] = [key]
    for t in inputs:
        found += (t.shape, t.dtype, t.get_device(), t.data_ptr() % 16, t.is_contiguous())
    return tuple(found)


def _fits(plan: Plan) -> bool:
    return plan.settings is None or plan.settings == _settings()


def _settings() -> tuple[Any, ...]:
    """PyTorch's, which say what it would call of cuBLAS."""
    c = torch._C
    return (
        c._get_blas_preferred_backend(), c._get_cublas_allow_bf16_reduced_precision_reduction(),
        c._get_cublas_allow_fp16_reduced_precision_reduction(), c._cuda_tunableop_is_enabled(),
    )  # fmt: skip


def _record(whole: Hashable, direction: Callable[..., Outputs], inputs: Sequence[Tensor], device: Any) -> Outputs:
    if overlap(inputs):  # a plan would not know which of them a launch means
        return direction(*inputs)
    with torch.cuda.device(device), Recorder(inputs) as seen:
        outputs = direction(*inputs)
    plan: Plan | str | None = seen.refusal if all(t.is_contiguous() for t in inputs) else "an input is not contiguous"
    if plan is None:
        try:
            plan = Plan(seen, outputs, device, _native())
            plan.settings = _settings() if plan.multiplies else None
            plan.last_use = next(_clock)
        except Unknown as reason:
            plan = str(reason)
    with _lock:
        _plans[whole] = plan
        while len(_plans) > MOST:
            gone = _plans.pop(min(_plans, key=_last_use))
            if isinstance(gone, Plan):
                gone.kept = False
    return outputs


def _last_use(whole: Hashable) -> int:
    """Refusals are the first to go."""
    plan = _plans[whole]
    return plan.last_use if isinstance(plan, Plan) else 0


@lru_cache
def _native() -> ModuleType | None:
    """The module of C++; None where it was not built."""
    try:
        return importlib.import_module("cibr_kernels._plans")
    except ImportError:
        return None


@lru_cache
def refusal() -> str | None:
    """Why this process replays nothing, whatever the call; None where it replays."""
    wanted = os.environ.get(SWITCH, "")
    if wanted == "0":
        return f"{SWITCH} is 0"
    if _native() is None:
        return "cibr_kernels._plans, the module of C++, is not built"
    if torch.version.hip:
        return "plans are NVIDIA's driver's, this PyTorch is ROCm's"
    if (missing := triton_call.unsupported()) is not None:
        return missing
    if wanted == "1" or triton_relaunch.is_compared():
        return None
    return f"{triton_relaunch.not_compared()}: {SWITCH}=1 replays all the same"
