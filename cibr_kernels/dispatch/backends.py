"""Which implementation of an op runs: chosen by name, or by what the tensors allow.

A backend is a module `<home of the op>.<name>` (`HOMES`) with functions that take the same arguments in each:

    unsupported(*tensors) -> str | None     the reason it cannot run on these tensors; where it has none, the backend's
    forward(...), backward(...)             what the registered operators call, through `run`
    stash_shape(n, m, dtype)                dot_lse only: the shape and dtype of what its forward may keep

A backend asked for by name is used or refused, never replaced.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import triton_call

NAMES: tuple[str, ...] = ("native", "triton", "reference")
HOMES = {
    "dot_lse": "primitives.dot.lse",
    "dot_softplus": "primitives.dot.softplus",
    "additive_moments": "primitives.additive.moments",
    "additive_scores": "primitives.additive.scores",
    "additive_shifts": "primitives.additive.shifts",
    "log_mean_exp": "primitives.log_mean_exp",
    "clip_loss": "losses.clip",
    "siglip_loss": "losses.siglip",
}

_missing: str | None = None
try:  # torch first (cibr_kernels/__init__.py sees to it), so that both share one OpenMP thread pool
    _C = importlib.import_module("cibr_kernels._C")
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _missing = f"the compiled module cibr_kernels._C is not there ({error}); run `pip install -e .` in the checkout"


def home(op: str) -> str:
    """The package whose modules are the backends of `op`."""
    return f"cibr_kernels.{HOMES[op]}"


def native_available() -> bool:
    """True when the compiled C++ kernels were built and load."""
    return _C is not None


def compiled() -> ModuleType:
    """The compiled module.  Raises RuntimeError, saying how to get it, when it is missing."""
    if _C is None:
        raise RuntimeError(_missing)
    return _C


def warn_if_missing() -> None:
    """One warning, at import, when the package works without its compiled kernels."""
    if _missing:
        warnings.warn(f"cibr_kernels: {_missing}; until then the CPU uses the N x N reference", stacklevel=3)


def cuda_missing() -> str | None:
    """Why the CUDA C++ kernels are not there; None when they are."""
    if _C is None:
        return _missing
    if not _C.has_cuda:
        return "cibr_kernels._C was built without CUDA: the build did not find nvcc and its static runtime"
    return None


def native_unsupported(*tensors: Tensor) -> str | None:
    """Why the C++ CPU kernels cannot run on these tensors; None when they can."""
    if _missing:
        return _missing
    for t in tensors:
        if t.device.type != "cpu":
            return f"the C++ kernels of this op run on the CPU, got {t.device}"
        if t.dtype.is_floating_point and t.dtype.itemsize > 4:
            return f"the C++ kernels compute in float32, got {t.dtype}"
    return None


def choose(op: str, backend: str, *tensors: Tensor) -> ModuleType:
    """The module that runs `op` on these tensors.

    "auto" takes the first of `NAMES` that supports them; off the CPU it never takes the reference, which builds the
    N x N matrix.  Raises ValueError for an unknown name, RuntimeError with every reason when none can run.
    """
    if backend not in ("auto", *NAMES):
        raise ValueError(f"backend is {backend!r}; known are 'auto', {', '.join(map(repr, NAMES))}")
    refusals = []
    for name in NAMES if backend == "auto" else (backend,):
        module, unsupported = _module(op, name)
        reason = unsupported(*tensors) if module else "not written for this op"
        if backend == "auto" and name == "reference" and tensors[0].device.type != "cpu":
            reason = "it builds the N x N matrix; ask for it by name to run it on an accelerator"
        if module and reason is None:
            return module
        refusals.append(f"{name}: {reason}")
    raise RuntimeError(f"no backend can run {op}: " + "; ".join(refusals))


def fused(op: str, backend: str, *tensors: Tensor) -> str | None:
    """The backend with kernels of its own for `op`, which has other ways too; None where there is none for these."""
    for name in NAMES if backend == "auto" else (backend,):
        module, unsupported = _module(op, name) if name in NAMES and name != "reference" else (None, _always)
        if module is not None and unsupported(*tensors) is None:
            return name
    return None


def _always(*tensors: Tensor) -> None:
    """What a backend says that can run on any tensors."""


@lru_cache
def _module(op: str, name: str) -> tuple[ModuleType | None, Callable[..., str | None]]:
    """The backend of an op, None where it has none, and what says why it cannot run on tensors: None when it can."""
    path = f"{home(op)}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        return None, _always
    usual = {"native": native_unsupported, "triton": triton_call.unsupported, "reference": _always}
    return module, getattr(module, "unsupported", usual[name])


def run(op: str, direction: str, backend: str, tensors: tuple[Tensor, ...], *args: Any) -> Any:
    """Calls `forward` or `backward` of the module chosen for `tensors`, in ranges named after the operator.

    nvtx's for the system's profilers; torch.profiler's, with the backend's name, while it looks on.
    """
    module = choose(op, backend, *tensors)
    return in_range(f"{op}_{direction}", module.__name__.rpartition(".")[2], getattr(module, direction), *args)


def in_range(name: str, backend: str, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in the ranges of `run`."""
    domain, attributes = _range(name)
    domain.push_range(attributes)
    try:
        if not torch.autograd._profiler_enabled():
            return function(*args)
        with torch.profiler.record_function(f"cibr_kernels::{name}.{backend}"):
            return function(*args)
    finally:
        domain.pop_range()


@lru_cache
def _range(name: str) -> tuple[Any, Any]:
    """nvtx's domain and attributes of a range, made once: pushing and popping them costs 0.1 us."""
    nvtx = importlib.import_module("nvtx")
    domain = nvtx.get_domain("cibr_kernels")
    return domain, domain.get_event_attributes(name)
