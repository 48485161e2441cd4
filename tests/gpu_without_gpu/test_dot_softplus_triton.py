"""dot_softplus in Triton, compiled for each GPU and executed without one, against float64."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from cases import DTYPES, towers
from covering import pairs
from executor import assert_tensor_cores, emulated, strips_of
from torch import Tensor

from cibr_kernels.primitives.dot.lse.triton_configs import Tiles
from cibr_kernels.primitives.dot.problem import SoftplusProblem
from cibr_kernels.primitives.dot.softplus import reference
from cibr_kernels.primitives.dot.softplus import triton as backend
from cibr_kernels.primitives.dot.softplus.op import dot_softplus, dot_softplus_sums
from cibr_kernels.testing import assert_close

CAPABILITIES = (80, 90, 100, 120)
NAMES = ("rows", "cols", "dx", "dy", "dscale", "dbias")


class Case(NamedTuple):
    n: int = 144  # a second panel of rows has the kernels of the first: 16 divides both
    m: int = 190
    d: int = 96
    first_positive: int = 16
    scale: float = 10.0
    bias: float = -10.0
    kind: str = "unit"  # cases.towers
    ids: bool = False
    attract: bool = False
    weights: str = "both"  # of the gradients: "both", "rows" or "none"
    cols: bool = True
    need_dx: bool = True
    need_dy: bool = True
    size: float = 1.0  # of the weights


RAGGED = Case()
SHAPES = {  # n and m, None: of case_of; d, first_positive
    "ragged": (None, None, 96, 16),
    "narrow": (None, None, 30, 16),  # a width that is copied to 32
    "wide": (None, None, 200, 16),
    "whole": (128, 256, 128, 128),
    "few": (3, 5, 7, 2),
    "one": (1, 1, 1, 0),
}
ORDINARY = [("unit", 10.0, -10.0), ("unit", -3.0, 0.5), ("unit", 1.0, -10.0)]  # kind, scale, bias
EXTREME = [
    ("unit", 30.0, 3.0),
    ("unit", 75.0, -15.0),  # logits from -90 to 60
    ("opposed", -20.0, 40.0),  # near 60
    ("opposed", 20.0, -60.0),  # near -80: G of float16 is 0
]
WEIGHTS, NEEDS = ("both", "none", "rows"), ((True, True), (True, False), (False, True), (False, False))


def case_of(
    capability: int,
    dtype: torch.dtype,
    weights: str,
    shape: str,
    logits: tuple[str, float, float],
    need: tuple[bool, bool],
) -> Case:
    """Ids, sums of columns, and which of two ragged sizes 16 divides: the target and the dtype decide.

    Kernels are compiled for that, which takes most of the time.  Every target and every dtype has each of the three.
    """
    i, j = CAPABILITIES.index(capability), DTYPES.index(dtype)
    ids, attract = ((False, False), (True, False), (True, True))[(i + j) % 3]
    n, m, d, first_positive = SHAPES[shape]
    if n is None:
        n, m = ((140, 192), (144, 190))[(i + j) % 2]
    if dtype == torch.float16 and logits == EXTREME[3]:
        logits = EXTREME[2]
    kind, scale, bias = logits
    cols = (i // 2 + j) % 2 == 0
    return Case(n, m, d, first_positive, scale, bias, kind, ids, attract, weights, cols, *need)


TILED = (CAPABILITIES, DTYPES, WEIGHTS, ("ragged", "narrow", "wide", "whole"), (*ORDINARY, *EXTREME), NEEDS)
TINY = (CAPABILITIES, DTYPES, WEIGHTS, ("few", "one"), ORDINARY[:2], NEEDS[::3])
PASSES = list(itertools.product(CAPABILITIES, DTYPES, WEIGHTS[:2]))  # with gradients and without
EVERY = [(*row[:2], case_of(*row)) for row in [*pairs(*TILED, starts=PASSES), *pairs(*TINY)]]
RUNS = list({run[:2]: run for run in reversed(EVERY)}.values())  # one of each target and dtype
ALL = [run for run in EVERY if run not in RUNS]
Inputs = dict[str, Tensor | None]


PANELS = backend.Panels(rows=128, gradient_rows=128, gradient_cols=128)


def problem(case: Case, dtype: torch.dtype) -> Inputs:
    x, y = towers(case.n, case.m, case.d, case.first_positive, case.kind)
    row_ids = torch.randint(0, 9, (case.n,)) + (1 << 40)
    col_ids = torch.randint(0, 9, (case.m,)) + (1 << 40)
    col_ids[case.first_positive : case.first_positive + case.n] = row_ids
    return {
        "x": x.to(dtype),
        "y": y.to(dtype),
        "scale": torch.tensor(case.scale),
        "bias": torch.tensor(case.bias),
        "row_weights": case.size * torch.rand(case.n) / case.n if case.weights != "none" else None,
        "col_weights": case.size * torch.rand(case.m) / case.m if case.weights == "both" else None,
        "row_ids": row_ids if case.ids else None,
        "col_ids": col_ids if case.ids else None,
    }


def run(module, case: Case, inputs: Inputs, panels: backend.Panels = PANELS) -> dict[str, Tensor]:
    how = {"panels": panels} if module is backend else {}
    needs = (case.need_dx and case.weights != "none", case.need_dy and case.weights != "none")
    x, y, scale, bias, row_weights, col_weights, row_ids, col_ids = inputs.values()
    problem = SoftplusProblem(x, y, scale, row_ids, col_ids, case.first_positive, bias, case.attract)
    return dict(zip(NAMES, module.forward(problem, row_weights, col_weights, case.cols, *needs, **how), strict=True))


def double(inputs: Inputs) -> Inputs:
    return {k: t.double() if t is not None and t.dtype.is_floating_point else t for k, t in inputs.items()}


def check(case: Case, actual: dict[str, Tensor], inputs: Inputs) -> None:
    eager, truth = run(reference, case, inputs), run(reference, case, double(inputs))
    products = inputs["x"].double() @ inputs["y"].double().T
    exponent = abs(case.scale) * products.abs().max().item() + abs(case.bias)
    magnitudes = {}
    if case.weights != "none" and case.ids and case.attract:  # G has both signs
        terms = double(inputs) | {"row_ids": None, "col_ids": None}
        both = [run(reference, case, terms | {"scale": s * terms["scale"], "bias": s * terms["bias"]}) for s in (1, -1)]
        magnitudes["dbias"] = sum(g["dbias"].item() for g in both)
        magnitudes["dscale"] = magnitudes["dbias"] * products.abs().max().item()
    elif case.weights != "none":
        magnitudes["dscale"] = truth["dbias"].item() * products.abs().max().item()
    for name, t in truth.items():
        features = torch.float32 if name in ("rows", "cols", "dbias") else inputs["x"].dtype
        assert_close(
            name,
            actual[name],
            eager[name],
            t,
            terms=max(case.n, case.m),
            exponent=exponent,
            features=features,
            magnitude=magnitudes.get(name, 0.0),
        )


def compare(capability: int, dtype: torch.dtype, case: Case, panels: backend.Panels = PANELS) -> list[str]:
    """Holds every output to the rule -> the names of the kernels launched."""
    inputs = problem(case, dtype)
    with emulated(capability) as gpu:
        actual = run(backend, case, inputs, panels)
    check(case, actual, inputs)
    return [name for name, _ in gpu.launches]


@pytest.mark.parametrize(("capability", "dtype", "case"), RUNS, ids=str)
def test_matches_float64(capability, dtype, case):
    assert "dot_softplus_sweep_kernel" in compare(capability, dtype, case)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "case"), ALL, ids=str)
def test_matches_float64_everywhere(capability, dtype, case):
    assert "dot_softplus_sweep_kernel" in compare(capability, dtype, case)


def test_launches():
    """One pass without weights, three with; nothing else of n x m."""
    start, panel = (
        ["dot_softplus_poison_kernel", "dot_total_kernel"],
        ["dot_softplus_sweep_kernel", "sums_reduce_kernel", "sums_reduce_kernel"],
    )
    assert compare(90, torch.bfloat16, RAGGED._replace(weights="none")) == [*start, *panel * 2]
    expected = [
        "dot_exponent_kernel",
        *start,
        *[*panel, "dot_features_gradient_kernel"] * 2,
        "dot_features_gradient_kernel",
        *["dot_total_kernel"] * 2,
    ]
    assert compare(90, torch.bfloat16, RAGGED) == expected


def test_strips_of_several_tiles(monkeypatch):
    monkeypatch.setattr(Tiles, "strip_tiles", lambda self, rows, cols: 2)
    panels = backend.Panels(rows=384, gradient_rows=256)
    grids = strips_of(monkeypatch)
    case = Case(n=300, m=310, first_positive=0)
    compare(100, torch.bfloat16, case, panels)
    compare(100, torch.bfloat16, case._replace(weights="none"), panels)
    assert [grid[1:] for grid in grids] == [((5,), 1), ((5,), 1), ((6,), 2)]  # tiles of 128 x 64, then of 128 x 128


def test_features_that_start_anywhere_and_weights_of_one_number():
    """TMA wants 16 bytes, and a contiguous view may start at any element; weights may be expanded."""
    case = Case(n=20, m=30, d=32, first_positive=3)
    inputs = problem(case, torch.bfloat16)
    inputs["row_weights"] = torch.tensor(0.25).expand(case.n)
    moved = {k: torch.cat([inputs[k].new_zeros(1), inputs[k].flatten()])[1:].view(inputs[k].shape) for k in ("x", "y")}
    assert all(t.data_ptr() % 16 and t.is_contiguous() for t in moved.values())
    with emulated(90):
        ours, expected = (run(backend, case, features) for features in (inputs | moved, inputs))
    assert all(torch.equal(ours[name], expected[name]) for name in NAMES)
    check(case, expected, inputs)


@pytest.mark.parametrize(
    ("name", "value"), [("x", math.nan), ("x", -math.inf), ("y", math.inf), ("bias", -math.inf), ("scale", math.inf)]
)
def test_what_is_not_finite_reaches_everything(name, value):
    """Also where infinite logits would have softplus 0, and where no pair counts."""
    for case in (Case(n=20, m=30, d=32, first_positive=3), Case(n=1, m=1, d=1, first_positive=0)):
        inputs = problem(case, torch.bfloat16)
        inputs[name].view(-1)[-1] = value
        with emulated(80):
            actual = run(backend, case, inputs)
        assert all(t.isnan().all() for t in actual.values()), {k: t.isnan().float().mean() for k, t in actual.items()}


def test_same_bits_whatever_the_panels():
    case = RAGGED._replace(weights="rows", need_dy=False)
    inputs, out = problem(case, torch.bfloat16), []
    for rows in (128, 256):
        with emulated(80):
            out.append(run(backend, case, inputs, backend.Panels(rows, rows)))
    for name in ("rows", "dx"):
        assert torch.equal(out[0][name], out[1][name]), name


@pytest.mark.parametrize("size", [1e-9, 1e6])
def test_float16_keeps_the_digits_of_small_and_large_weights(size):
    """G of float16 features is float16 too, and a weight times a probability is often below its smallest number."""
    case = RAGGED._replace(size=size, need_dy=False)
    inputs = problem(case, torch.float16)
    with emulated(90):
        actual = run(backend, case, inputs)
    truth = run(reference, case, double(inputs))
    for name in ("dscale", "dbias"):
        error = (actual[name] - truth[name]).abs() / truth[name].abs()
        assert error < 2 * torch.finfo(torch.float16).eps, (name, error)


@pytest.mark.parametrize("bias", [-80.0, -20.0, -3.0, 0.0, 3.0, 60.0])
def test_softplus_and_sigmoid_to_their_own_size(bias):
    """Every pair by itself (m = 1), from logits of `bias` - 5 to `bias` + 5."""
    n = 64
    x, y = torch.linspace(-5, 5, n)[:, None], torch.ones(1, 1)
    whole = SoftplusProblem(x, y, torch.tensor(1.0), None, None, -1, torch.tensor(bias), False)
    with emulated(80):
        rows, _, dx, *_ = backend.forward(whole, torch.ones(n), None, False, True, False)
    t = x[:, 0].double() + bias
    for name, found, expected in (
        ("softplus", rows, torch.logaddexp(t, torch.zeros(()))),
        ("G", dx[:, 0], t.sigmoid()),
    ):
        kept = torch.arange(n) != 1  # row 1's positive is column 0
        error = ((found - expected).abs() / expected)[kept].max()
        assert error < (4 + abs(bias) + 5) * torch.finfo(torch.float32).eps, (name, error)
        assert found[1] == 0, name


@pytest.mark.parametrize("sums", [False, True])
def test_the_operators(sums):
    case = Case(n=40, m=50, d=32, first_positive=5, ids=True, attract=True)
    inputs = problem(case, torch.bfloat16)
    how = {k: inputs[k] for k in ("row_ids", "col_ids")} | {"first_positive": case.first_positive, "attract": True}
    found = []
    for name in ("triton", "reference"):
        own = [inputs[k].clone().requires_grad_() for k in ("x", "y", "scale", "bias", "row_weights", "col_weights")]
        *features, u, v = own
        with emulated(90):
            if sums:
                rows, cols = dot_softplus_sums(*features, **how, backend=name)
                total = (rows * u).sum() + (cols * v).sum()
            else:
                total = dot_softplus(*own, **how, backend=name)
            found.append([total.detach(), *torch.autograd.grad(total, own)])
    for got, expected in zip(*found, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


def test_uses_the_tensor_cores():
    case = RAGGED._replace(n=10, m=30)
    assert_tensor_cores(lambda: run(backend, case, problem(case, torch.bfloat16)), ("dot_softplus_sweep_kernel",))
