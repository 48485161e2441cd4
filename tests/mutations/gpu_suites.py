"""The suites of mutations.py: each op's small problems that tell right kernels from wrong ones.

Tiles are made small (16 to 64), so that small problems have several tiles each way, ragged ends and several panels.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import nvcc
import torch
from cases import limits_between
from executor import emulated
from mutations import ROOT, Fault, Suite
from torch import Tensor

from cibr_kernels import testing
from cibr_kernels.dispatch import backends
from cibr_kernels.primitives.additive.activations import ACTIVATIONS
from cibr_kernels.primitives.additive.problem import AdditiveProblem, MomentsProblem
from cibr_kernels.primitives.dot.problem import LseGradients, LseProblem, LseSums, SoftplusProblem

ALL = True, True, True  # gradients
Case = dict[str, tuple[Tensor, Tensor, dict[str, Any]]]  # output: eager, truth, options of assert_close


class _Checked:
    """A suite whose outputs are named "case output"."""

    def check(self, outputs: dict[str, Tensor]) -> None:
        for name, actual in outputs.items():
            eager, truth, options = self.expected[name]
            empty = truth == float("-inf")
            assert torch.equal(actual == float("-inf"), empty), f"{name}: which sums are empty"
            actual, eager, truth = (t.masked_fill(empty, 0.0) for t in (actual, eager, truth))
            testing.assert_close(name, actual, eager, truth, **options)

    expected: Case


@contextmanager
def faulty_modules(op: str, fault: Fault | None) -> Iterator[ModuleType]:
    """The launcher of an op's Triton backend, freshly imported with the fault in its file; put back afterwards."""
    package = backends.home(op)
    parent = importlib.import_module(package)
    ours = {n: m for n, m in sys.modules.items() if n.startswith(f"{package}.triton")}
    attributes = {n: vars(parent)[n] for n in list(vars(parent)) if n.startswith("triton")}
    for name in ours:
        del sys.modules[name]
    for name in attributes:
        delattr(parent, name)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if fault is not None and fault.path:
                name = ".".join(Path(fault.path).with_suffix("").parts)
                file = Path(folder) / Path(fault.path).name
                file.write_text(fault.source())  # Triton reads the source of its kernels from the file
                spec = importlib.util.spec_from_file_location(name, file)
                module = importlib.util.module_from_spec(spec)
                sys.modules[name] = module
                spec.loader.exec_module(module)
                setattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2], module)
            yield importlib.import_module(f"{package}.triton")
    finally:
        for name in [n for n in sys.modules if n.startswith(f"{package}.triton")]:
            del sys.modules[name]
        for name in [n for n in vars(parent) if n.startswith("triton")]:
            delattr(parent, name)
        sys.modules.update(ours)
        for name, module in attributes.items():
            setattr(parent, name, module)


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


class Dot(_Checked):
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
        with faulty_modules("dot_lse", fault) as launcher:
            configs = importlib.import_module("cibr_kernels.primitives.dot.lse.triton_configs")
            small = configs.Config(*self.tile)
            table = {key: configs.Configs(small, small, small) for key in configs.CONFIGS}
            for name, case in self.cases.items():
                panels = launcher.Panels(self.panel, self.panel, self.panel, owned_width=128 if case.owned else 0)
                with (
                    patch.object(configs, "CONFIGS", table),
                    patch.object(launcher, "panels", panels),
                    emulated(self.capability, edit_ptx=fault.edit_ptx if fault else None),
                ):
                    outputs = self._call(launcher, case)
                yield {f"{name} {k}": t for k, t in outputs.items()}

    def _call(self, launcher: ModuleType, case: DotCase) -> dict[str, Tensor]:
        t = self.inputs(case)
        shape, dtype = launcher.stash_shape(case.n, case.m, case.dtype)
        stash = torch.full(shape if case.stash else (0,), float("nan"), dtype=dtype)
        limits = case.limits(t["x"], t["y"])
        problem = LseProblem(t["x"], t["y"], t["scale"], *case.ids, case.first_positive, case.mask, limits)
        *sums, row_max, col_max, shift = launcher.forward(problem, not case.limited, case.groups, stash)
        gradients = LseGradients(t["g_rows"], t["g_cols"], t["g_positives"])
        grads = launcher.backward(problem, LseSums(*sums, shift, stash), gradients, True, True)
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


class Softplus(_Checked):
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
        with faulty_modules("dot_softplus", fault) as launcher:
            configs = importlib.import_module("cibr_kernels.primitives.dot.lse.triton_configs")
            small = configs.Config(*self.tile)
            table = {key: configs.Configs(small, small, small) for key in configs.CONFIGS}
            for name, case in self.cases.items():
                with (
                    patch.object(configs, "CONFIGS", table),
                    patch.object(launcher, "CONFIGS", dict.fromkeys(launcher.CONFIGS, small)),
                    patch.object(launcher, "panels", launcher.Panels(self.panel, self.panel, self.panel)),
                    emulated(self.capability, edit_ptx=fault.edit_ptx if fault else None),
                ):
                    outputs = launcher.forward(*self.arguments(case))
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


# ---------------------------------------------------------------- additive_moments
@dataclass(frozen=True)
class AdditiveCase:
    activation: str
    n: int = 37
    m: int = 70
    first_positive: int = 17
    h: int = 21
    size: float = 3.0
    slope: float = 0.2
    include: bool = False
    groups: int = 0  # critics of one problem; 0: one alone

    def problem(self, tensors: list[Tensor], dtype: torch.dtype = torch.float32) -> MomentsProblem:
        a, b, w = (t.to(dtype) for t in tensors)
        return MomentsProblem(a, b, w, self.activation, self.slope, self.first_positive, self.include)


class _Additive(_Checked):
    cases: dict[str, AdditiveCase]

    @staticmethod
    def inputs(case: AdditiveCase) -> list[Tensor]:
        torch.manual_seed(case.n + case.h)
        lead = (case.groups,) if case.groups else ()
        w = case.size * torch.randn(*lead, case.h) / math.sqrt(case.h)
        return [torch.randn(*lead, case.n, case.h), torch.randn(*lead, case.m, case.h), w]

    names = ("J", "L", "da of L", "db of L", "dw of L", "da", "db", "dw")

    @staticmethod
    def outputs(module: Any, problem: MomentsProblem) -> list[Tensor]:
        """Forward, and the backward of gradients that differ in sign and from critic to critic."""
        j, el, *of_l = module.forward(problem, ALL)
        grow = torch.arange(1.0, 1.0 + problem.groups, dtype=j.dtype).view(j.shape)
        return [j, el, *of_l, *module.backward(0.7 * grow, -1.3 / grow, problem, tuple(of_l), ALL)]

    @cached_property
    def expected(self) -> Case:
        from cibr_kernels.primitives.additive.moments import reference

        found: Case = {}
        for name, case in self.cases.items():
            tensors = self.inputs(case)
            eager, truth = (self.outputs(reference, case.problem(tensors, d)) for d in (torch.float32, torch.float64))
            t = tensors[0].unsqueeze(-2).double() + tensors[1].unsqueeze(-3).double()
            terms = (ACTIVATIONS[case.activation][0](t, case.slope) * tensors[2][..., None, None, :]).abs().sum(-1)
            options = {"terms": case.n + case.m + case.h, "exponent": terms.max().item(), "features": torch.float32}
            of_w = t.abs().max().item()
            sizes = terms.mean().item(), math.log(case.n * case.m), 0.0, 0.0, of_w, 0.0, 0.0, 3 * of_w
            for k, e, v, size in zip(self.names, eager, truth, sizes, strict=True):
                found[f"{name} {k}"] = e, v, {**options, "magnitude": size}
        return found


class AdditiveTriton(_Additive):
    def __init__(self, capability: int, cases: dict[str, AdditiveCase]):
        self.capability, self.cases = capability, cases

    def run(self, fault: Fault | None) -> Iterator[dict[str, Tensor]]:
        with faulty_modules("additive_moments", fault) as launcher:
            small = replace(launcher.CONFIGS["kinked"], num_warps=2, unroll=2, unroll_gradient=2, block=16, block_h=16)
            changes = {"CONFIGS": {"kinked": small, "smooth": small}, "PAD": 16, "PANEL_BYTES": 16 * 80 * 2 * 4}
            changes["POSITIVES"] = {"BLOCK_R": 16, "BLOCK_H": 16}
            with patch.multiple(launcher, **changes):
                for name, case in self.cases.items():
                    with emulated(self.capability, edit_ptx=fault.edit_ptx if fault else None):
                        outputs = self.outputs(launcher, case.problem(self.inputs(case)))
                    yield {f"{name} {k}": t for k, t in zip(self.names, outputs, strict=True)}


class AdditiveScores(_Checked):
    """Of a case n, m, h, the activation and its slope count."""

    def __init__(self, capability: int, cases: dict[str, AdditiveCase]):
        self.capability, self.cases = capability, cases

    names = ("S", "da", "db", "dw")

    @staticmethod
    def outputs(module: Any, case: AdditiveCase, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        a, b, w = (t.to(dtype) for t in _Additive.inputs(case))
        problem = AdditiveProblem(a, b, w, case.activation, case.slope)
        grad = (torch.randn(case.n, case.m, generator=torch.Generator().manual_seed(1)) / case.m).to(dtype)
        return [module.forward(problem), *module.backward(grad, problem, ALL)]

    def run(self, fault: Fault | None) -> Iterator[dict[str, Tensor]]:
        with faulty_modules("additive_scores", fault) as launcher:
            moments = launcher.moments
            small = replace(moments.CONFIGS["kinked"], num_warps=2, unroll=2, unroll_gradient=2, block=16, block_h=16)
            changes = {"CONFIGS": {"kinked": small, "smooth": small}, "PAD": 16, "PANEL_BYTES": 16 * 80 * 2 * 4}
            with patch.multiple(moments, **changes):
                for name, case in self.cases.items():
                    with emulated(self.capability, edit_ptx=fault.edit_ptx if fault else None):
                        outputs = self.outputs(launcher, case)
                    yield {f"{name} {k}": t for k, t in zip(self.names, outputs, strict=True)}

    @cached_property
    def expected(self) -> Case:
        from cibr_kernels.primitives.additive.scores import reference

        found: Case = {}
        for name, case in self.cases.items():
            eager, truth = (self.outputs(reference, case, dtype) for dtype in (torch.float32, torch.float64))
            a, b, w = (t.double() for t in _Additive.inputs(case))
            t = a[:, None] + b
            options = {"terms": case.n + case.m + case.h, "exponent": 0.0, "features": torch.float32}
            sizes = (t.abs() * w.abs()).sum(-1).max().item(), 0.0, 0.0, t.abs().max().item() * case.n
            for k, e, v, size in zip(self.names, eager, truth, sizes, strict=True):
                found[f"{name} {k}"] = e, v, {**options, "magnitude": size}
        return found


class AdditiveCuda(_Additive):
    """The launcher is the compiled module's; the fault is in the kernels that it launches."""

    def __init__(self, arch: str, cases: dict[str, AdditiveCase]):
        self.arch, self.cases = arch, cases

    def run(self, fault: Fault | None) -> Iterator[dict[str, Tensor]]:
        import plans

        from cibr_kernels.primitives.additive.moments import native

        with tempfile.TemporaryDirectory() as folder:
            sources = Path(folder) / "csrc"
            shutil.copytree(ROOT / "csrc", sources)
            if fault is not None and fault.path:
                (Path(folder) / fault.path).write_text(fault.source())
            unit = sources / "additive/moments/cuda.cu"
            unit.write_text(_only_relu(unit.read_text()))
            with patch.object(plans, "CSRC", sources), patch.object(native, "SCORE_BUDGET", 1):
                for name, case in self.cases.items():
                    with plans.emulated(self.arch):
                        outputs = self.outputs(native, case.problem(self.inputs(case)))
                    yield {f"{name} {k}": t for k, t in zip(self.names, outputs, strict=True)}


def _only_relu(text: str) -> str:
    """The unit without the kernels of the other activations, which take nvcc most of its time."""
    text = re.sub(r"^CK_\w+\((?!relu\b)\w+, .*\)\n", "", text, flags=re.M)
    text = re.sub(r"CK_POSITIVES_ENTRY\(\w+\)(?=[,}])", "CK_POSITIVES_ENTRY(relu)", text)
    return re.sub(r"CK_ENTRY\(\w+, \w+\)(?=[,}])", "CK_ENTRY(relu, relu)", text)


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
    "additive": AdditiveTriton(80, {"relu": AdditiveCase("relu"), "gelu": AdditiveCase("gelu", size=30.0)}),
    "additive_group": AdditiveTriton(80, {
        "relu": AdditiveCase("relu", n=20, m=33, first_positive=5, groups=2),
        "gelu": AdditiveCase("gelu", n=20, m=33, first_positive=5, groups=2),
    }),
    "softplus": Softplus(80, (16, 16, 16, 1, 2), 32, {
        "plain": SoftplusCase(), "left out": SoftplusCase(ids=True), "attract": SoftplusCase(ids=True, attract=True),
        "low": SoftplusCase(scale=1.0, bias=-30.0),
    }),
    "softplus_sm80_bf16": Softplus(80, (32, 32, 16, 2, 3), 64, {
        "bf16": SoftplusCase(70, 100, 64, 5, dtype=torch.bfloat16),
    }),
    "additive_scores": AdditiveScores(80, {"relu": AdditiveCase("relu"), "gelu": AdditiveCase("gelu", size=30.0)}),
    "additive_cuda": AdditiveCuda("80", {"relu": AdditiveCase("relu", n=130, m=140, first_positive=7)}),
    "additive_cuda_group": AdditiveCuda("80", {"relu": AdditiveCase("relu", n=20, m=33, first_positive=5, groups=2)}),
}  # fmt: skip


def missing(suite: str) -> str | None:
    """Why a suite cannot run here; None when it can."""
    if not isinstance(SUITES[suite], AdditiveCuda):
        return None
    return backends.cuda_missing() or (None if nvcc.find() else "nvcc was not found")
