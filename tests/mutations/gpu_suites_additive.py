"""Small problems of additive critics for mutations.py, in blocks of 16."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import plans
import torch
from executor import emulated
from gpu_checked import ALL, Case, Checked, launcher_of
from mutations import ROOT, Fault, Suite
from torch import Tensor

from cibr_kernels.primitives.additive.activations import ACTIVATIONS
from cibr_kernels.primitives.additive.problem import AdditiveProblem, MomentsProblem, ShiftsProblem


@contextmanager
def small_blocks(moments: ModuleType) -> Iterator[None]:
    """Inside, the launcher of additive_moments makes small blocks, and panels of 16 rows or so."""
    config = replace(moments.CONFIGS["kinked"], num_warps=2, unroll=2, unroll_gradient=2, block=16, block_h=16)
    changes = {"CONFIGS": {"kinked": config, "smooth": config}, "PAD": 16, "PANEL_BYTES": 16 * 80 * 2 * 4}
    with patch.multiple(moments, POSITIVES={"BLOCK_R": 16, "BLOCK_H": 16}, **changes):
        yield


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


class _Additive(Checked):
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
        with launcher_of("additive_moments", fault) as launcher, small_blocks(launcher):
            for name, case in self.cases.items():
                with emulated(self.capability, edit_ptx=fault.edit_ptx if fault else None):
                    outputs = self.outputs(launcher, case.problem(self.inputs(case)))
                yield {f"{name} {k}": t for k, t in zip(self.names, outputs, strict=True)}


class AdditiveScores(Checked):
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
        with launcher_of("additive_scores", fault) as launcher, small_blocks(launcher.moments):
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


class AdditiveShifts(Checked):
    """n rows of a against m of b, more: some rows of b meet none; the last shifts go round the end."""

    n, m, h, k, first = 21, 25, 20, 6, 3
    names = ("S", "da", "db", "dw")

    def __init__(self, capability: int, activation: str):
        self.capability, self.activation = capability, activation

    def outputs(self, module: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(0)
        a, b, w = (torch.randn(shape).to(dtype) for shape in ((self.n, self.h), (self.m, self.h), (self.h,)))
        problem = ShiftsProblem(a, b, w, self.activation, 0.2, self.first, self.k)
        made = module.forward(problem), *module.backward(torch.randn(self.k, self.n).to(dtype), problem, ALL)
        return dict(zip(self.names, made, strict=True))

    def run(self, fault: Fault | None) -> Iterator[dict[str, Tensor]]:
        tile = {"BLOCK_R": 16, "BLOCK_H": 16}
        with launcher_of("additive_shifts", fault) as launcher, patch.object(launcher, "TILE", tile):
            with emulated(self.capability, edit_ptx=fault.edit_ptx if fault else None):
                found = self.outputs(launcher, torch.float32)
            yield found

    @cached_property
    def expected(self) -> Case:
        from cibr_kernels.primitives.additive.shifts import reference

        eager, truth = (self.outputs(reference, dtype) for dtype in (torch.float32, torch.float64))
        options = {"terms": self.n * self.k + self.h, "exponent": 0.0, "features": torch.float32}
        return {name: (eager[name], t, options) for name, t in truth.items()}


class AdditiveCuda(_Additive):
    """The launcher is the compiled module's; the fault is in the kernels that it launches."""

    def __init__(self, arch: str, cases: dict[str, AdditiveCase]):
        self.arch, self.cases = arch, cases

    def run(self, fault: Fault | None) -> Iterator[dict[str, Tensor]]:
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
    "additive": AdditiveTriton(80, {"relu": AdditiveCase("relu"), "gelu": AdditiveCase("gelu", size=30.0)}),
    "additive_group": AdditiveTriton(80, {
        "relu": AdditiveCase("relu", n=20, m=33, first_positive=5, groups=2),
        "gelu": AdditiveCase("gelu", n=20, m=33, first_positive=5, groups=2),
    }),
    "additive_scores": AdditiveScores(80, {"relu": AdditiveCase("relu"), "gelu": AdditiveCase("gelu", size=30.0)}),
    "additive_shifts": AdditiveShifts(80, "elu"),
    "additive_cuda": AdditiveCuda("80", {"relu": AdditiveCase("relu", n=130, m=140, first_positive=7)}),
    "additive_cuda_group": AdditiveCuda("80", {"relu": AdditiveCase("relu", n=20, m=33, first_positive=5, groups=2)}),
}  # fmt: skip
