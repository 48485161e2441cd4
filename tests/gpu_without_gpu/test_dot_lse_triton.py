"""dot_lse in Triton, compiled for each GPU and executed without one, against float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from cases import DTYPES, limits_between, towers
from covering import pairs
from executor import assert_tensor_cores, emulated, strips_of
from torch import Tensor

from cibr_kernels.primitives.dot import triton_parts
from cibr_kernels.primitives.dot.lse import reference, triton_configs
from cibr_kernels.primitives.dot.lse import triton as backend
from cibr_kernels.primitives.dot.lse.triton_configs import CONFIGS, Config, Configs, Tiles
from cibr_kernels.primitives.dot.problem import LseGradients, LseProblem, LseSums
from cibr_kernels.testing import assert_close

CAPABILITIES = (80, 90, 100, 120)


class Case(NamedTuple):
    n: int = 144  # a second panel of rows has the kernels of the first: 16 divides both
    m: int = 190
    d: int = 96
    first_positive: int = 16
    scale: float = 100.0
    kind: str = "unit"  # cases.towers
    mask: bool = True
    cols: bool = True
    stash: bool = False
    owned: bool = False  # the backward without P in memory
    need_dx: bool = True
    need_dy: bool = True
    groups: str = ""  # ids(); where there are groups, maxima too
    limits: bool = False  # cases.limits_between

    @property
    def maxima(self) -> bool:
        return self.groups != ""


RAGGED = Case()
SHAPES = {  # n and m, None: of case_of; d, first_positive
    "ragged": (None, None, 96, 16),
    "narrow": (None, None, 30, 16),  # a width that is copied to 32
    "wide": (None, None, 200, 16),  # 128 where rows are owned
    "whole": (128, 256, 128, 128),
    "few": (3, 5, 7, 2),
    "one": (1, 1, 1, 0),
}
WAYS = ("P", "stash", "owned")
SCALED = (("unit", 100.0), ("unit", 1.0))
ONLINE = ("raw", 100.0)  # from the start, so that a stash stays unwritten
UNDERFLOWS = ("opposed", 100.0)  # and is online then
NEEDS = ((True, True), (True, False), (False, True), (False, False))


def case_of(
    capability: int,
    dtype: torch.dtype,
    way: str,
    shape: str,
    kind: tuple[str, float],
    need: tuple[bool, bool],
) -> Case:
    """Which sums there are, and which of two ragged sizes 16 divides, the target and the dtype decide.

    Kernels are compiled for that, which takes most of the time.  Every target and every dtype has each of both.
    """
    i = CAPABILITIES.index(capability) + DTYPES.index(dtype)
    mask, cols = ((True, True), (False, True), (False, False))[i % 3]
    n, m, d, first_positive = SHAPES[shape]
    if n is None:
        n, m = ((140, 192), (144, 190))[i % 2]
    if way == "owned":
        d = min(d, 128)
    towers_of, scale = kind
    return Case(n, m, d, first_positive, scale, towers_of, mask, cols, way == "stash", way == "owned", *need)


TILED = (CAPABILITIES, DTYPES, WAYS, ("ragged", "narrow", "wide", "whole"), (*SCALED, ONLINE, UNDERFLOWS), NEEDS)
TINY = (CAPABILITIES, DTYPES, WAYS, ("few", "one"), (*SCALED, ONLINE), NEEDS[::3])
GRADIENTS = [  # every kernel that makes gradients, of every dtype that it has, on every target
    row for row in itertools.product(CAPABILITIES, DTYPES, WAYS) if row[1:] != (torch.float32, "owned")
]
EVERY = [(*row[:2], case_of(*row)) for row in [*pairs(*TILED, starts=GRADIENTS), *pairs(*TINY)]]
RUNS = list({run[:2]: run for run in reversed(EVERY)}.values())  # one of each target and dtype
ALL = [run for run in EVERY if run not in RUNS]
SMALL = Case(n=37, m=70, d=32, first_positive=17)
GROUPED = [  # (mask, cols, stash) everywhere, the groups in turn
    *(SMALL._replace(groups="few", kind=kind) for kind in ("unit", "raw")),
    *(SMALL._replace(groups="few", kind=kind, owned=True) for kind in ("unit", "opposed")),
    SMALL._replace(groups="few", stash=True, mask=False),
    SMALL._replace(groups="few", cols=False, mask=False, kind="raw"),
    SMALL._replace(groups="rows"),
    SMALL._replace(groups="columns", stash=True),
    SMALL._replace(groups="rows", kind="opposed"),  # rows that underflow among rows that are empty
    SMALL._replace(groups="columns", kind="raw", mask=False),
    SMALL._replace(groups="last"),  # a row's only column is the last: some underflow
    SMALL._replace(groups="one", scale=1.0),
    SMALL._replace(groups="one", kind="raw", mask=False),
    SMALL._replace(groups="one", cols=False, owned=True),
    SMALL._replace(groups="apart", mask=False, stash=True),  # nothing but maxima
    Case(n=1, m=1, d=1, first_positive=0, groups="apart"),
]
LIMITED = [  # sums of rows only
    SMALL._replace(limits=True, cols=False),
    SMALL._replace(limits=True, cols=False, kind="raw", groups="few"),
    SMALL._replace(limits=True, cols=False, stash=True, mask=False),
    SMALL._replace(limits=True, cols=False, kind="opposed"),
]


PANELS = backend.Panels(forward_rows=128, backward_rows=128, backward_cols=128)


def problem(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """x, y, scale and the gradients of rows, cols and positives."""
    x, y = towers(case.n, case.m, case.d, case.first_positive, case.kind)
    gradients = [
        torch.rand(case.n) / case.n,
        torch.rand(case.m if case.cols else 0) / case.m,
        -torch.rand(case.n) / case.n,
    ]
    return x.to(dtype), y.to(dtype), torch.tensor(case.scale), gradients


def ids(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """(n,) and (m,), or None twice.  Numbers whose lower 32 bits are all the same.

    "few": groups of several rows and columns.  "rows", "columns": one group has all columns (rows) and every third row
    (column), whose sums are empty.  "last": one group has all but the last column.  "one": a single group, no sum has
    a term.  "apart": no two are alike.
    """
    i, j = torch.arange(case.n), torch.arange(case.m)
    if not case.groups:
        return None, None
    rows, cols = {
        "few": (i % 4, j % 5),
        "rows": ((i % 3 > 0).long(), 0 * j),
        "columns": (0 * i, (j % 3 > 0).long()),
        "last": (0 * i, (j == case.m - 1).long()),
        "one": (0 * i, 0 * j),
        "apart": (i, case.n + j),
    }[case.groups]
    return rows << 32, cols << 32


def run(
    module, case: Case, x: Tensor, y: Tensor, scale: Tensor, gradients: list[Tensor], panels: backend.Panels = PANELS
) -> dict[str, Tensor]:
    """Every output of a backend by name, `stash_shift` among them."""
    groups = ids(case)
    panels = dataclasses.replace(panels, owned_width=128 if case.owned else 0)
    how = {"panels": panels} if module is backend else {}
    stash = x.new_empty(0)
    if case.stash:
        shape, dtype = module.stash_shape(case.n, case.m, x.dtype)
        stash = torch.empty(shape, dtype=dtype)
    limits = None
    if case.limits:
        limits = limits_between(scale.double() * x.double() @ y.double().T).to(scale.dtype)
    problem = LseProblem(x, y, scale, *groups, case.first_positive, case.mask, limits)
    out = module.forward(problem, case.cols, case.maxima, stash, **how)
    sums = LseSums(*out[:3], out[5], stash)
    grads = module.backward(problem, sums, LseGradients(*gradients), case.need_dx, case.need_dy, **how)
    names = ("rows", "cols", "positives", "row_max", "col_max", "stash_shift", "dx", "dy", "dscale")
    return dict(zip(names, (*out, *grads), strict=True))


def check(case: Case, dtype: torch.dtype, actual: dict[str, Tensor], inputs: tuple) -> None:
    """Holds every output to the rule, and the mode to what the sums need."""
    x, y, scale, gradients = inputs
    eager = run(reference, case, x, y, scale, gradients)
    truth = run(reference, case, x.double(), y.double(), scale.double(), [g.double() for g in gradients])
    logits = scale.double() * x.double() @ y.double().T
    weight = (
        sum(g.sum().item() for g in gradients[:2]) - gradients[2].sum().item()
    )  # dscale is a difference of such sums
    magnitudes = {"dscale": weight * logits.abs().max().item() / case.scale}
    for name, t in truth.items():
        if name == "stash_shift":
            continue
        finite = torch.isfinite(t)
        assert torch.equal(actual[name][~finite].double(), t[~finite]), name
        assert_close(
            name,
            actual[name][finite],
            eager[name][finite],
            t[finite],
            terms=max(case.n, case.m),
            exponent=logits.abs().max().item(),
            features=dtype,
            magnitude=magnitudes.get(name, 0.0),
        )
    bound = case.scale * math.prod(t.double().norm(dim=1).max().item() for t in (x, y))
    sums = torch.cat([truth["rows"], truth["cols"]])
    underflow = (sums.isfinite() & (sums < max(0.0, bound - 60) - 55)).any().item()
    if case.limits:  # a row without anything below its limit is taken for one that underflowed
        underflow = True
    assert actual["stash_shift"].isnan().item() == (bound > 110 or underflow)  # NaN: the online mode


def expected_kernels(case: Case, dtype: torch.dtype) -> set[str]:
    """What makes the gradients of a case; which of them does the work, the device decides."""
    if case.stash:
        return {"dot_lse_unstash_kernel", "dot_lse_online_gradient_kernel"}
    if case.owned and dtype.itemsize == 2:
        return {"dot_lse_owned_gradient_kernel"}
    return {"dot_lse_gradient_kernel", "dot_lse_online_gradient_kernel"}


GRADIENT_KERNELS = {
    "dot_lse_unstash_kernel",
    "dot_lse_gradient_kernel",
    "dot_lse_online_gradient_kernel",
    "dot_lse_owned_gradient_kernel",
}


def compare(capability: int, dtype: torch.dtype, case: Case, panels: backend.Panels = PANELS) -> list[str]:
    """Holds every output to the rule -> the names of the kernels launched."""
    x, y, scale, gradients = inputs = problem(case, dtype)
    with emulated(capability) as gpu:
        actual = run(backend, case, x, y, scale, gradients, panels)
    check(case, dtype, actual, inputs)
    return [name for name, _ in gpu.launches]


@pytest.mark.parametrize(("capability", "dtype", "case"), RUNS, ids=str)
def test_matches_float64(capability, dtype, case):
    assert GRADIENT_KERNELS.intersection(compare(capability, dtype, case)) == expected_kernels(case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "case"), ALL, ids=str)
def test_matches_float64_everywhere(capability, dtype, case):
    assert GRADIENT_KERNELS.intersection(compare(capability, dtype, case)) == expected_kernels(case, dtype)


@pytest.mark.parametrize(("number", "case"), list(enumerate(GROUPED + LIMITED)), ids=str)
def test_groups_limits_and_maxima(number, case, monkeypatch):
    """Tiles of 16 x 16 make a few of the small problem."""
    small = Config(16, 16, 16, 1, 2)
    monkeypatch.setattr(triton_configs, "CONFIGS", dict.fromkeys(CONFIGS, Configs(small, small, small)))
    dtype = torch.float16 if case.owned else DTYPES[number % 3]
    assert GRADIENT_KERNELS.intersection(compare(80, dtype, case)) == expected_kernels(case, dtype)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_groups_and_maxima_on_every_target(capability):
    case = RAGGED._replace(groups="few", mask=capability < 100, stash=capability == 90)
    launched = compare(capability, torch.bfloat16, case)
    assert GRADIENT_KERNELS.intersection(launched) == expected_kernels(case, torch.bfloat16)


@pytest.mark.parametrize(("capability", "dtype"), [(90, torch.bfloat16), (120, torch.float16)], ids=str)
def test_without_tensor_descriptors(capability, dtype, monkeypatch):
    """Triton before 3.4 has none.  A width that 32 divides and 64 does not: steps are those of sm_80."""
    monkeypatch.setattr(triton_configs, "has_descriptors", lambda: False)
    case = RAGGED._replace(n=70, m=90, stash=capability == 90)
    assert GRADIENT_KERNELS.intersection(compare(capability, dtype, case)) == expected_kernels(case, dtype)


@pytest.mark.parametrize("stash", [False, True])
def test_features_that_start_anywhere(stash):
    """TMA wants 16 bytes, and a contiguous view may start at any element."""
    case = Case(n=20, m=30, d=32, first_positive=3, stash=stash)
    x, y, scale, gradients = problem(case, torch.bfloat16)
    moved = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (x, y)]
    assert all(t.data_ptr() % 16 and t.is_contiguous() for t in moved)
    with emulated(90):
        ours, expected = (run(backend, case, *features, scale, gradients) for features in (moved, (x, y)))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_launches():
    """One pass forward and three backward, two with a stash; the online kernels return at once."""
    panels = 2
    before, after = ["dot_lse_statistics_kernel", "dot_lse_choose_kernel"], ["dot_lse_fold_kernel"]
    forward = [
        *before,
        *["dot_lse_scores_kernel", *after] * panels,
        *["dot_lse_online_scores_kernel", *after] * panels,
    ]
    weights = ["dot_exponent_kernel", "dot_lse_weights_kernel"]
    for stash, kernel in ((False, "dot_lse_gradient_kernel"), (True, "dot_lse_unstash_kernel")):
        tiles = 1 if stash else 2  # columns of a panel are cut, a stash's are not
        panel = [*[kernel, "dot_lse_online_gradient_kernel"] * tiles, "dot_features_gradient_kernel"]
        backward = [*weights, *panel * panels, "dot_features_gradient_kernel", "dot_total_kernel"]
        assert compare(90, torch.bfloat16, RAGGED._replace(stash=stash)) == forward + backward


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refuses_what_is_not_finite(value):
    x, y, scale, gradients = problem(RAGGED, torch.bfloat16)
    y[150, 3] = value
    with emulated(90):
        actual = run(backend, RAGGED, x, y, scale, gradients)
    for name, t in actual.items():
        assert t.isnan().all(), name


def test_rows_of_a_panel_from_a_stash():
    """As many as allowed, within the bytes, but not fewer than 2048; multiples of 128."""
    most, size = backend.Panels().backward_rows, backend.Panels().stash_bytes
    rows = {n: triton_parts.rows_of_panel(most, size, n, n, 2) for n in (100, 8192, 65536, 131072, 1 << 20)}
    assert rows == {100: 100, 8192: 8192, 65536: 8192, 131072: 4096, 1 << 20: 2048}
    assert triton_parts.rows_of_panel(most, size, 65536, 65536, 4) == 4096
    assert triton_parts.rows_of_panel(most, size, 1 << 20, 70001, 2) % 128 == 0


def test_columns_of_a_panel():
    """All where they fit 128 MiB or twice the features, fewer for longer batches: P stays as small as the features."""
    most, size = backend.Panels().backward_cols, backend.Panels().backward_bytes
    cols = {
        n: triton_parts.cols_of_panel(most, size, min(n, 8192), n, n, 512, 2)
        for n in (100, 8192, 16384, 65536, 1 << 20)
    }
    assert cols == {100: 100, 8192: 8192, 16384: 8192, 65536: 16384, 1 << 20: 16384}
    assert triton_parts.cols_of_panel(most, size, 8192, 70001, 70001, 96, 4) % 128 == 0


def test_a_long_sum_is_made_by_several_programs(monkeypatch):
    monkeypatch.setattr(triton_parts, "LONG_TOTAL", 1024)
    parts = torch.rand(4 * 1024 + 5)
    with emulated(90) as e:
        total = triton_parts.total(parts)
    assert e.launches == [("dot_total_kernel", (5,)), ("dot_total_kernel", (1,))]
    torch.testing.assert_close(total, parts.double().sum().float(), rtol=1e-6, atol=0)


def test_strips_of_several_tiles(monkeypatch):
    monkeypatch.setattr(Tiles, "strip_tiles", lambda self, rows, cols: 2)
    panels = backend.Panels(forward_rows=384, backward_rows=256)
    grids = strips_of(monkeypatch)
    for stash in (False, True):
        compare(100, torch.bfloat16, Case(n=300, m=310, first_positive=0, stash=stash), panels)
    # 300 x 310: 3 x 3 tiles forward, 2 and 1 rows of tiles backward
    scores, gradient = ("dot_lse_scores_kernel", (6,), 2), [("dot_lse_gradient_kernel", (3,), 1)] * 2
    assert grids == [scores, *gradient, scores]


def test_same_bits_whatever_the_panels():
    x, y, scale, gradients = problem(RAGGED, torch.bfloat16)
    case = RAGGED._replace(cols=False)
    out = []
    for rows in (128, 256):
        panels = backend.Panels(rows, rows)
        with emulated(80):
            out.append(run(backend, case, x, y, scale, [gradients[0], gradients[1][:0], gradients[2]], panels))
    for name in ("rows", "positives", "dx"):
        assert torch.equal(out[0][name], out[1][name]), name


@pytest.mark.parametrize("size", [1e-9, 1e6])
def test_float16_keeps_the_digits_of_small_and_large_gradients(size):
    """P of float16 features is float16 too, and g / 2n is often below its smallest number."""
    case = RAGGED._replace(scale=2.0)
    x, y, scale, gradients = problem(case, torch.float16)
    with emulated(90):
        whole = LseProblem(x, y, scale, None, None, case.first_positive, True)
        rows, cols, positives, _, _, shift = backend.forward(whole, True, False, x.new_empty(0))
        sums = LseSums(rows, cols, positives, shift, x.new_empty(0))
        scaled = backend.backward(whole, sums, LseGradients(*(g * size for g in gradients)), True, True)
    doubles = dataclasses.replace(whole, x=x.double(), y=y.double(), scale=scale.double())
    exact = LseSums(*(t.double() for t in sums))
    truth = reference.backward(doubles, exact, LseGradients(*(g.double() * size for g in gradients)), True, True)
    error = (scaled[2] - truth[2]).abs() / truth[2].abs()
    assert error < 2 * torch.finfo(torch.float16).eps, error


def test_uses_the_tensor_cores():
    case = Case(n=16, m=16, d=64, first_positive=0)
    assert_tensor_cores(
        lambda: run(backend, case, *problem(case, torch.bfloat16)), ("dot_lse_scores_kernel", "dot_lse_gradient_kernel")
    )
