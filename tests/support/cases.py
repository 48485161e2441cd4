"""What the op tests share: instruction sets, inputs that make bugs visible, gradients, recorded operator calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cibr_kernels.dispatch import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = backends.compiled().supported_isas() if backends.native_available() else ["none"]
LARGE = 1 << 40  # a stash budget that every test fits

each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def towers(n: int, m: int, d: int, first_positive: int = 0, kind: str = "unit") -> tuple[Tensor, Tensor]:
    """x (n, d), y (m, d), alike at the positives, float32.

    kind "unit": unit norm.  "raw": norms near sqrt(d), past the range of one shared exponent.  "opposed": all x near u
    and all y near -u, so that every row lies at the far end of the shared exponent's range.
    """
    torch.manual_seed(n * 131 + m * 7 + d)
    x, y = torch.randn(n, d), torch.randn(m, d)
    y[first_positive : first_positive + n] += x
    if kind == "opposed":
        x, y = x * 0.02 + 1, y * 0.02 - 1
    if kind in ("unit", "opposed"):
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    return x, y


def limits_between(logits: Tensor) -> Tensor:
    """logits (n, m) float64 -> limits (n,) halfway between two neighbours two thirds up each row, far from rounding.

    Nothing of row 0 stays, and all of row 1.
    """
    ordered = logits.sort(1).values
    m = logits.shape[1]
    low = max(0, min(2 * m // 3, m - 2))
    gaps = ordered.diff(dim=1)
    low = low + gaps[:, low : low + 5].argmax(1) if m > 6 else torch.full((len(logits),), low)
    at = torch.arange(len(logits))
    limits = (ordered[at, low] + ordered[at, (low + 1).clamp(max=m - 1)]) / 2
    limits[0] = logits.min() - 1
    limits[1:2] = torch.inf
    return limits


def leaves(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Fresh leaves that require gradients, cast to `dtype` if given."""
    return [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]


def with_gradients(
    f: Callable[..., Any], *tensors: Tensor, weights: Iterable[float] = (1.0,), dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The outputs of f, then the gradients of their weighted sum for each tensor."""
    inputs = leaves(*tensors, dtype=dtype)
    out = f(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    total = sum(weight * o for weight, o in zip(weights, out, strict=True))
    return [*(o.detach() for o in out), *torch.autograd.grad(total, inputs)]


class Recorded(TorchDispatchMode):
    """The calls of this package's operators, in order: (name, arguments, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "cibr_kernels":
            self.calls.append((func._schema.name.split("::")[1], args, out))
        return out

    def named(self, name: str) -> list[tuple[tuple, Any]]:
        return [(args, out) for called, args, out in self.calls if called == name]
