"""Small problems of dot products for mutations.py.

Tiles are made small (16 to 64), so that small problems have several tiles each way, ragged ends and several panels.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from cases import limits_between
from executor import emulated
from gpu_checked import Case, Checked, launcher_of
from mutations import Fault, Suite
from torch import Tensor

from cibr_kernels.primitives.dot.problem import LseGradients, LseProblem, LseSums, SoftplusProblem


# ---------------------------------------------------------------- dot_lse
@dataclass(frozen=True)
class DotCase:
    """scale 3 keeps one exponential for all; 200 needs the online maxima.  With groups: maxima too; with limits: sums
    of rows only."""

    n: int
    m: int
    d: int
    first_positive: int
    scale: float
    mask: bool = True
    stash: bool = False
    owned: bool = False  # a backward without P in memory
    dtype: torch.dtype = torch.float32
    groups: bool = False
    limited: bool = False

    def limits(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Two thirds up each row, but for two rows that keep all; in the dtype of float64 or float32 features."""
        if not self.limited:
            return None
        limits = limits_between(self.scale * x.double() @ y.double().T)
        limits[0] = torch.inf
        return limits.to(x.dtype)

    @property
    def ids(self) -> tuple[Tensor | None, Tensor | None]:
        """Numbers that differ above their lower 32 bits; the columns of the last group are nobody's."""
        return (torch.arange(self.n) % 4 << 32, torch.arange(self.m) % 5 << 32) if self.groups else (None, None)


class Dot(Checked):
    def __init__(self, capability: int, tile: tuple[int, int, int, int, int], panel: int, cases: dict[str, DotCase]):
        self.capability, self.tile, self.panel, self.cases = capability, tile, panel, cases

    @staticmethod
    def inputs(case: DotCase) -> dict[str, Tensor]:
        torch.manual_seed(case.n)
        x, y = (torch.randn(r, case.d) / math.sqrt(case.d) for r in (case.n, case.m))
        rows, cols, positives = (torch.randn(k) for k in (case.n, case.m, case.n))
        grads = {"g_rows": rows, "g_cols": cols[:0] if case.limited else cols, "g_positives": positives}
        return {"x": x.to(case.dtype), "y": y.to(case.dtype), "scale": torch.tensor(case.scale), **grads}

    def run(self, fault: Fault | None) -> Iterator[dict[str, Tensor]]:
        with launcher_of("dot_lse", fault) as launcher:
            configs = importlib.import_module("cibr_kernels.primitives.dot.lse.triton_configs")
            small = configs.Config(*self.tile)
            table = {key: configs.Configs(small, small, small) for key in configs.CONFIGS}
            for name, case in self.cases.items():
                with (
                    patch.object(configs, "CONFIGS", table),
                    emulated(self.capability, edit_ptx=fault.edit_ptx if fault else None),
                ):
                    outputs = self._call(launcher, case)
                yield {f"{name} {k}": t for k, t in outputs.items()}

    def _call(self, launcher: ModuleType, case: DotCase) -> dict[str, Tensor]:
        t = self.inputs(case)
        panels = launcher.Panels(self.panel, self.panel, self.panel, owned_width=128 if case.owned else 0)
        shape, dtype = launcher.stash_shape(case.n, case.m, case.dtype)
        stash = torch.full(shape if case.stash else (0,), float("nan"), dtype=dtype)
        limits = case.limits(t["x"], t["y"])
        problem = LseProblem(t["x"], t["y"], t["scale"], *case.ids, case.first_positive, case.mask, limits)
        *sums, row_max, col_max, shift = launcher.forward(problem, not case.limited, case.groups, stash, panels=panels)
        gradients = LseGradients(t["g_rows"], t["g_cols"], t["g_positives"])
        grads = launcher.backward(problem, LseSums(*sums, shift, stash), gradients, True, True, panels)
        maxima = (row_max, col_max) if case.groups else ()
        return dict(zip(self.names(case), (*sums, *maxima, *grads), strict=True))

    @staticmethod
    def names(case: DotCase) -> tuple[str, ...]:
        maxima = ("row_max", "col_max") if case.groups else ()
        return ("rows", "cols", "positives", *maxima, "dx", "dy", "dscale")

    @cached_property
    def expected(self) -> Case:
        from cibr_kernels.primitives.dot.lse.reference import dot_lse

        found: Case = {}
        for name, case in self.cases.items():
            t = self.inputs(case)

            def outputs(dtype: torch.dtype, t: dict[str, Tensor] = t, case: DotCase = case) -> list[Tensor]:
                kept = [
                    v.to(dtype if dtype == torch.float64 else v.dtype).detach().requires_grad_()
                    for v in (t["x"], t["y"], t["scale"])
                ]
                found = dot_lse(
                    *kept, *case.ids, first_positive=case.first_positive, mask_positives=case.mask,
                    row_limits=case.limits(kept[0].detach(), kept[1].detach()), need_cols=not case.limited,
                    need_max=case.groups,
                )  # fmt: skip
                sums = found[:3]
                weights = [t[g].to(s.dtype) for g, s in zip(("g_rows", "g_cols", "g_positives"), sums, strict=True)]
                total = sum((s * w).sum() for s, w in zip(sums, weights, strict=True))
                return [*(s.detach() for s in found), *torch.autograd.grad(total, kept)]

            eager, truth = outputs(torch.float32), outputs(torch.float64)
            exponent = case.scale * (t["x"].double() @ t["y"].double().T).abs().max().item()
            options = {"terms": case.n + case.m + case.d, "exponent": exponent, "features": case.dtype}
            along = (truth[-3] * t["x"]).abs().sum().item() / case.scale  # dscale cancels
            for k, e, v in zip(self.names(case), eager, truth, strict=True):
                found[f"{name} {k}"] = e, v, options | ({"magnitude": along} if k == "dscale" else {})
        return found


# ---------------------------------------------------------------- dot_softplus
@dataclass(frozen=True)
class SoftplusCase:
    n: int = 38
    m: int = 53
    d: int = 24
    first_positive: int = 5
    scale: float = 3.0
    bias: float = -1.0
    ids: bool = False
    attract: bool = False
    dtype: torch.dtype = torch.float32


class Softplus(Checked):
    def __init__(
        self, capability: int, tile: tuple[int, int, int, int, int], panel: int, cases: dict[str, SoftplusCase]
    ):
        self.capability, self.tile, self.panel, self.cases = capability, tile, panel, cases

    @staticmethod
    def arguments(case: SoftplusCase, double: bool = False) -> list[Any]:
        torch.manual_seed(case.n)
        x, y = (torch.randn(r, case.d) / math.sqrt(case.d) for r in (case.n, case.m))
        ids = [torch.arange(r) % k + (1 << 40) for r, k in ((case.n, 7), (case.m, 9))] if case.ids else [None, None]
        t = [x.to(case.dtype), y.to(case.dtype), torch.tensor(case.scale), torch.tensor(case.bias)]
        t += [torch.rand(case.n), torch.rand(case.m)]
        x, y, scale, bias, *weights = (v.double() if double else v for v in t)
        return [SoftplusProblem(x, y, scale, *ids, case.first_positive, bias, case.attract), *weights, True, True, True]

    def run(self, fault: Fault | None) -> Iterator[dict[str, Tensor]]:
        with launcher_of("dot_softplus", fault) as launcher:
            configs = importlib.import_module("cibr_kernels.primitives.dot.lse.triton_configs")
            small = configs.Config(*self.tile)
            table = {key: configs.Configs(small, small, small) for key in configs.CONFIGS}
            for name, case in self.cases.items():
                with (
                    patch.object(configs, "CONFIGS", table),
                    patch.object(launcher, "CONFIGS", dict.fromkeys(launcher.CONFIGS, small)),
                    emulated(self.capability, edit_ptx=fault.edit_ptx if fault else None),
                ):
                    panels = launcher.Panels(self.panel, self.panel, self.panel)
                    outputs = launcher.forward(*self.arguments(case), panels=panels)
                yield {f"{name} {k}": t for k, t in zip(self.names, outputs, strict=True)}

    names = ("rows", "cols", "dx", "dy", "dscale", "dbias")

    @cached_property
    def expected(self) -> Case:
        from cibr_kernels.primitives.dot.softplus import reference

        found: Case = {}
        for name, case in self.cases.items():
            eager, truth = (reference.forward(*self.arguments(case, double)) for double in (False, True))
            problem, u, v, *_ = self.arguments(case, True)
            products = problem.x @ problem.y.T
            exponent = case.scale * products.abs().max().item() + abs(case.bias)
            weight = (u[:, None] + v).sum().item()  # dscale and dbias cancel
            sizes = {"dbias": weight, "dscale": weight * products.abs().mean().item()}
            for k, e, t in zip(self.names, eager, truth, strict=True):
                found[f"{name} {k}"] = e, t, {
                    "terms": case.n + case.m + case.d, "exponent": exponent, "magnitude": sizes.get(k, 0.0),
                    "features": torch.float32 if k in ("rows", "cols", "dbias") else case.dtype,
                }  # fmt: skip
        return found


SUITES: dict[str, Suite] = {
    "dot": Dot(80, (16, 16, 16, 1, 2), 32, {
        "fixed": DotCase(38, 53, 24, 5, 3.0), "online": DotCase(38, 53, 24, 5, 200.0),
        "stash": DotCase(38, 53, 24, 5, 40.0, stash=True),  # bound past 60: the shift is not 0
    }),
    "dot_sm90": Dot(90, (64, 32, 32, 4, 2), 64, {"bf16": DotCase(70, 100, 128, 5, 3.0, dtype=torch.bfloat16)}),
    "dot_sm80_bf16": Dot(80, (32, 32, 16, 2, 3), 64, {"bf16": DotCase(70, 100, 64, 5, 3.0, dtype=torch.bfloat16)}),
    "dot_owned": Dot(80, (16, 16, 16, 1, 2), 64, {
        "fixed": DotCase(38, 53, 24, 5, 3.0, owned=True, dtype=torch.float16),
        "online": DotCase(38, 53, 24, 5, 200.0, owned=True, dtype=torch.float16),
    }),
    "dot_groups": Dot(80, (16, 16, 16, 1, 2), 32, {
        "low": DotCase(1, 4, 8, 0, 140.0, groups=True),  # the first column is empty, the last one underflows
        "fixed": DotCase(38, 53, 24, 5, 40.0, groups=True), "online": DotCase(38, 53, 24, 5, 200.0, groups=True),
    }),
    "dot_limits": Dot(80, (16, 16, 16, 1, 2), 32, {
        "fixed": DotCase(38, 53, 24, 5, 3.0, limited=True), "online": DotCase(38, 53, 24, 5, 200.0, limited=True),
    }),
    "dot_alone": Dot(80, (16, 16, 16, 1, 2), 32, {"low": DotCase(1, 4, 8, 0, 140.0)}),  # one row: a column underflows
    "dot_owned_groups": Dot(80, (16, 16, 16, 1, 2), 64, {
        "fixed": DotCase(38, 53, 24, 5, 3.0, owned=True, dtype=torch.float16, groups=True),
    }),
    "softplus": Softplus(80, (16, 16, 16, 1, 2), 32, {
        "plain": SoftplusCase(), "left out": SoftplusCase(ids=True), "attract": SoftplusCase(ids=True, attract=True),
        "low": SoftplusCase(scale=1.0, bias=-30.0),
    }),
    "softplus_sm80_bf16": Softplus(80, (32, 32, 16, 2, 3), 64, {
        "bf16": SoftplusCase(70, 100, 64, 5, dtype=torch.bfloat16),
    }),
}  # fmt: skip
