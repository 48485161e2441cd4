"""Which implementation of an op runs: chosen by name, or by what the tensors allow.

A backend is a module `cibr_kernels.ops.<op>.<name>` with three functions:

    unsupported(*tensors) -> str | None     the reason it cannot run on these tensors
    forward(...), backward(...)             what the registered operators call

A backend asked for by name is used or refused, never replaced.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

from torch import Tensor

NAMES = ("native", "reference")

_missing: str | None = None
try:  # torch first (cibr_kernels/__init__.py sees to it), so that both share one OpenMP thread pool
    _C = importlib.import_module("cibr_kernels._C")
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _missing = f"the compiled module cibr_kernels._C is not there ({error}); run `pip install -e .` in the checkout"


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


def native_unsupported(*tensors: Tensor) -> str | None:
    """Why the C++ CPU kernels cannot run on these tensors; None when they can."""
    if _missing:
        return _missing
    for t in tensors:
        if t.device.type != "cpu":
            return f"the C++ kernels run on the CPU, got {t.device}"
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
        module = importlib.import_module(f"cibr_kernels.ops.{op}.{name}")
        reason = module.unsupported(*tensors)
        if backend == "auto" and name == "reference" and tensors[0].device.type != "cpu":
            reason = "it builds the N x N matrix; ask for it by name to run it on an accelerator"
        if reason is None:
            return module
        refusals.append(f"{name}: {reason}")
    raise RuntimeError(f"no backend can run {op}: " + "; ".join(refusals))
