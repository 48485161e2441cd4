"""What `torch.utils.flop_counter.FlopCounterMode` counts of each operator: the matmuls that it makes, 2 n m d apiece.

An additive critic counts as its eager definition would: a product of (n m, h) with w forward, one for each gradient.
The table is entered when that module is imported, by whomever: it brings Triton, which this package does not.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def _pass(x: Shape, y: Shape) -> int:
    """One product over all pairs of rows of x (n, d) and y (m, d)."""
    return 2 * x[0] * y[0] * x[1]


def _dot_lse_backward(*args: Any, out_shape: Any = None, **options: Any) -> int:
    """Without kept exponentials the logits are made again."""
    x, y, stash = args[3], args[4], args[13]
    *_, need_dx, need_dy, _ = args
    return _pass(x, y) * (int(0 in stash) + need_dx + need_dy)


def _dot_softplus_total(x: Shape, y: Shape, *args: Any, out_shape: Any = None, **options: Any) -> int:
    *_, need_dx, need_dy, _ = args
    return _pass(x, y) * (1 + need_dx + need_dy)


def _dot_softplus_backward(g_rows: Shape, g_cols: Shape, x: Shape, y: Shape, *args: Any, **options: Any) -> int:
    return _dot_softplus_total(x, y, *args)


def _additive_moments(a: Shape, b: Shape, *args: Any, out_shape: Any = None, **options: Any) -> int:
    *_, need_a, need_b, need_w, _ = args
    return math.prod(a[:-2]) * _pass(a[-2:], b[-2:]) * (1 + need_a + need_b + need_w)


def _additive_contrast(a: Shape, b: Shape, *args: Any, out_shape: Any = None, **options: Any) -> int:
    *_, need_a, need_b, need_w, _, _ = args
    return _pass(a, b) * (1 + need_a + need_b + need_w)


def _additive_shifts(a: Shape, b: Shape, w: Shape, first: int, k: int, *args: Any, **options: Any) -> int:
    return 2 * k * a[0] * a[1]


def _scores_backward(grad: Shape, a: Shape, *args: Any, out_shape: Any = None, **options: Any) -> int:
    *_, need_a, need_b, need_w, _ = args
    return 2 * grad[0] * grad[1] * a[1] * (need_a + need_b + need_w)


def _forward(x: Shape, y: Shape, *args: Any, out_shape: Any = None, **options: Any) -> int:
    return _pass(x, y)


FORMULAS = {
    "dot_lse_forward": _forward,
    "dot_lse_backward": _dot_lse_backward,
    "dot_softplus_forward": _forward,
    "dot_softplus_total": _dot_softplus_total,
    "dot_softplus_backward": _dot_softplus_backward,
    "additive_moments_forward": _additive_moments,
    "additive_contrast_forward": _additive_contrast,
    "additive_scores_forward": _forward,
    "additive_scores_backward": _scores_backward,
    "additive_shifts_forward": _additive_shifts,
    "additive_shifts_backward": _scores_backward,
}


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds nothing itself: the module's own loader gets one more line to run."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.cibr_kernels, name))(formula)


def install() -> None:
    """Enters the formulas, now or when the counter is imported; once, after the operators are defined."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
