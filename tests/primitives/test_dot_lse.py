"""dot_lse: any weights on rows, columns and positives, against float64, in both tiers, on every instruction set.

clip_loss and dot_moments (their own files) cover shapes and scales; here every output has a gradient of its own.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, ISAS, LARGE, each_isa, leaves, limits_between, towers
from covering import each_pair
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels import testing
from cibr_kernels.primitives.dot.lse.op import dot_lse, dot_lse_forward, stash_budget_on
from cibr_kernels.primitives.dot.lse.reference import dot_lse as reference

SHAPES = [(1, 1, 0, 8), (1, 3, 1, 5), (33, 33, 0, 100), (40, 100, 17, 65)]
REGIMES = [("unit", 1.0), ("unit", 100.0), ("raw", 14.3), ("opposed", 100.0)]  # kind of towers, scale
NAMES = ("rows", "cols", "positives", "row_max", "col_max", "dx", "dy", "dscale")
FAR = 2**62  # ids are any int64


def groups(kind: str, n: int, m: int) -> dict[str, Tensor | None]:
    """few: most pairs differ, some positives share their group; one: every pair is of one group;
    row: row 0 shares its group with every column; column: the last column with every row."""
    if kind == "none":
        return {"row_ids": None, "col_ids": None}
    if kind == "few":  # 5 and 7 divide no panel of rows or chunk of columns: another's ids are wrong ones
        return {"row_ids": torch.arange(n) % 5 - FAR, "col_ids": torch.arange(m) % 7 - FAR}
    rows, cols = torch.full((n,), 5), torch.full((m,), 5)
    if kind == "row":
        rows[1:] = FAR
    if kind == "column":
        cols[:-1] = FAR
    return {"row_ids": rows, "col_ids": cols}


def weighted(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    """The outputs, then the gradients of their sum with weights of both signs; empty sums have no weight."""
    torch.manual_seed(3)
    total = torch.zeros((), dtype=outputs[0].dtype)
    for t in outputs:
        weights = torch.randn(t.shape, dtype=torch.float64).to(t.dtype)
        total = total + (weights * t.masked_fill(t.detach() == float("-inf"), 0.0)).sum()
    return [*(t.detach() for t in outputs), *torch.autograd.grad(total, inputs)]


@functools.lru_cache(maxsize=2)
def expected(shape: tuple[int, ...], dtype: torch.dtype, kind: str, scale: float, mask: bool, grouping: str):
    n, m, first_positive, d = shape
    x, y = (t.to(dtype) for t in towers(n, m, d, first_positive, kind))
    inputs = x, y, torch.tensor(scale)
    options = {**groups(grouping, n, m), "first_positive": first_positive, "mask_positives": mask, "need_max": True}
    eager, truth = (
        weighted(reference(*tensors, **options), tensors)
        for tensors in (leaves(*inputs), leaves(*inputs, dtype=torch.float64))
    )
    logits = scale * x.double() @ y.double().T
    return inputs, options, eager, truth, logits.abs().max().item()


def check(shape, dtype, kind, scale, mask, isa, grouping="none", budgets=(0, LARGE)) -> None:
    inputs, options, eager, truth, exponent = expected(shape, dtype, kind, scale, mask, grouping)
    _, m, _, d = shape
    for budget in budgets:
        ck.set_stash_budget(budget)
        tensors = leaves(*inputs)
        with testing.instruction_set(isa):
            actual = weighted(dot_lse(*tensors, **options, backend="native"), tensors)
        for name, a, e, t in zip(NAMES, actual, eager, truth, strict=True):
            empty = t == float("-inf")
            assert torch.equal(a == float("-inf"), empty), name
            a, e, t = (v.masked_fill(empty, 0.0) for v in (a, e, t))
            # weights of both signs cancel in dscale = sum <x, dx> / scale: measured against the sum of absolute terms
            magnitude = (truth[-3] * inputs[0]).abs().sum().item() / scale if name == "dscale" else 0.0
            testing.assert_close(
                f"{name}, stash budget {budget}",
                a,
                e,
                t,
                terms=m + d,
                exponent=exponent,
                features=dtype,
                magnitude=magnitude,
            )


@each_pair(shape=SHAPES, dtype=DTYPES, regime=REGIMES[:3], mask=(True, False), isa=ISAS)
def test_any_weights(shape, dtype, regime, mask, isa):
    check(shape, dtype, *regime, mask, isa)


@each_pair(
    shape=[(7, 10, 3, 5), (40, 100, 17, 65)],
    dtype=DTYPES,
    grouping=["few", "one", "row", "column"],
    regime=REGIMES,
    mask=(True, False),
    isa=ISAS,
)
def test_groups(shape, dtype, grouping, regime, mask, isa):
    check(shape, dtype, *regime, mask, isa, grouping)


@each_isa
@pytest.mark.parametrize("grouping", ["none", "few"])
@pytest.mark.parametrize(("kind", "scale"), [("unit", 20.0), ("raw", 2.0)])
def test_several_panels_and_chunks(kind, scale, grouping, isa):
    check((600, 4200, 90, 33), torch.float32, kind, scale, True, isa, grouping)


def far_below(n: int, m: int) -> tuple[Tensor, Tensor]:
    """Unit rows alike, but row 1 opposed to every column and column 1 to every row: e^-200 of the largest pair."""
    torch.manual_seed(5)
    x, y = F.normalize(torch.randn(n, 16) * 0.02 + 1, dim=1), F.normalize(torch.randn(m, 16) * 0.02 + 1, dim=1)
    x[1], y[1] = -x[1], -y[1]
    return x, y


@each_isa
@pytest.mark.parametrize("kind", ["unit", "raw"])  # with one shift, and with maxima
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grouping", ["none", "few"])
def test_row_limits(grouping, dtype, kind, isa):
    n, m, first_positive, d = shape = (70, 90, 3, 40)
    x, y = (t.to(dtype) for t in towers(*shape[:2], d, first_positive, kind))
    inputs = x, y, torch.tensor(9.0)
    logits = 9 * x.double() @ y.double().T
    limits, exponent = limits_between(logits), logits.abs().max().item()
    options = {**groups(grouping, n, m), "first_positive": first_positive, "need_cols": False, "need_max": True}
    eager, truth = (
        weighted(reference(*tensors, row_limits=limits.to(like), **options), tensors)
        for tensors, like in ((leaves(*inputs), torch.float32), (leaves(*inputs, dtype=torch.float64), torch.float64))
    )
    assert truth[0][0] == -math.inf and truth[0].isfinite().sum() > n - 3
    for budget in (0, LARGE):
        ck.set_stash_budget(budget)
        tensors = leaves(*inputs)
        with testing.instruction_set(isa):
            actual = weighted(dot_lse(*tensors, row_limits=limits.float(), **options, backend="native"), tensors)
        for a, e, t in zip(actual, eager, truth, strict=True):
            assert torch.equal(a == -math.inf, t == -math.inf)
            a, e, t = (v.masked_fill(v == -math.inf, 0.0) for v in (a, e, t))
            testing.assert_close("", a, e, t, terms=m, exponent=exponent, features=dtype)


@each_isa
@pytest.mark.parametrize("budget", [0, LARGE])
def test_an_empty_sum_is_told_from_one_that_underflowed(budget, isa):
    n, m, scale = 40, 70, torch.tensor(100.0)  # every exponential relative to the shared shift, 40: e^-140 is 0
    x, y = far_below(n, m)
    row_ids, col_ids = torch.arange(n), torch.full((m,), 100)
    row_ids[0] = 100  # shares its group with every column
    with testing.instruction_set(isa):
        rows, cols, _, row_max, col_max, shift, _ = dot_lse_forward(
            x, y, scale, row_ids, col_ids, None, 0, True, True, True, budget, "native"
        )
        assert torch.isnan(shift)  # online
        truth = reference(x.double(), y.double(), scale.double(), row_ids, col_ids, need_max=True)
        for actual, t in zip((rows, cols, row_max, col_max), (truth[0], truth[1], *truth[3:]), strict=True):
            torch.testing.assert_close(actual.double(), t, rtol=2e-6, atol=0)
        assert rows[0] == row_max[0] == float("-inf")
        assert rows[1] < -90 and cols[1] < -90

        # where nothing underflows, an empty row does not end the fixed shift
        keep = [i for i in range(n) if i != 1], [j for j in range(m) if j != 1]
        x, y, row_ids, col_ids = x[keep[0]], y[keep[1]], row_ids[keep[0]], col_ids[keep[1]]
        rows, _, _, _, _, shift, _ = dot_lse_forward(
            x, y, scale, row_ids, col_ids, None, 0, True, True, True, LARGE, "native"
        )
        assert shift == pytest.approx(40, abs=1e-3)
        assert torch.equal(rows == float("-inf"), torch.arange(n - 1) == 0)


@each_isa
@pytest.mark.parametrize("far", ["row", "column"])
def test_one_sum_far_below_the_shared_exponent(far, isa):
    """Only that of row 1, or of column 1, underflows, and it alone has to end the fixed shift."""
    x, y = far_below(40, 70)
    if far == "row":
        y[1] = y[0]
    else:
        x[1] = x[0]
    with testing.instruction_set(isa):
        rows, cols, *_, shift, _ = dot_lse_forward(
            x, y, torch.tensor(100.0), None, None, None, 0, True, True, False, 0, "native"
        )
    truth = reference(x.double(), y.double(), torch.tensor(100.0, dtype=torch.float64))
    assert torch.isnan(shift) and (rows[1] if far == "row" else cols[1]) < -90
    for actual, t in zip((rows, cols), truth[:2], strict=True):
        torch.testing.assert_close(actual.double(), t, rtol=2e-6, atol=0)


@each_isa
@pytest.mark.parametrize("scale", [3.0, 90.0, 300.0])
def test_the_number_of_threads_changes_no_bit(scale, isa):
    x, y = towers(500, 700, 70, 30)
    options = {**groups("few", 500, 700), "first_positive": 30, "need_max": True, "backend": "native"}
    results = []
    with testing.instruction_set(isa):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            tensors = leaves(x, y, torch.tensor(scale))
            results.append(weighted(dot_lse(*tensors, **options), tensors))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@each_isa
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_give_nan(bad, isa):
    x, y = towers(5, 7, 4)
    x[2, 1] = bad
    with testing.instruction_set(isa):
        for t in dot_lse(x, y, torch.tensor(2.0), **groups("few", 5, 7), need_max=True, backend="native"):
            assert torch.isnan(t).all()


@each_isa
def test_an_empty_sum_has_no_gradient(isa):
    x, y = leaves(*towers(1, 1, 8))
    with testing.instruction_set(isa):
        rows, cols, positives = dot_lse(x, y, torch.tensor(2.0), backend="native")
        assert rows.item() == cols.item() == float("-inf")
        dx, dy = torch.autograd.grad(rows.sum() + cols.sum() + positives.sum(), (x, y))
    torch.testing.assert_close((dx, dy), (2 * y.detach(), 2 * x.detach()))


def test_columns_are_computed_only_when_needed():
    x, y = towers(5, 7, 4)
    rows, cols, _, row_max, col_max = dot_lse(x, y, torch.tensor(2.0), need_cols=False, need_max=True)
    assert cols.shape == col_max.shape == (0,)
    torch.testing.assert_close(rows, dot_lse(x, y, torch.tensor(2.0))[0])
    torch.testing.assert_close(row_max, reference(x, y, torch.tensor(2.0), need_max=True)[3])


def test_a_gpu_keeps_nothing_unless_a_budget_is_set():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (stash_budget_on(cpu), stash_budget_on(gpu)) == (64 << 20, 0)
    ck.set_stash_budget(1 << 20)
    assert (stash_budget_on(cpu), stash_budget_on(gpu), ck.stash_budget()) == (1 << 20, 1 << 20, 1 << 20)
    ck.set_stash_budget(None)
    assert (stash_budget_on(cpu), stash_budget_on(gpu), ck.stash_budget()) == (64 << 20, 0, 64 << 20)
