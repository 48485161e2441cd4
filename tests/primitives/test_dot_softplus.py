"""dot_softplus: sums, weighted totals and every gradient against float64, on every instruction set."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import DTYPES, ISAS, each_dtype, each_isa, leaves, towers
from covering import each_pair
from torch import Tensor

from cibr_kernels import testing
from cibr_kernels.primitives.dot.softplus.op import dot_softplus, dot_softplus_sums
from cibr_kernels.primitives.dot.softplus.reference import _signs
from cibr_kernels.primitives.dot.softplus.reference import dot_softplus as reference

SHAPES = [(1, 3, 1, 8), (33, 33, 0, 100), (40, 100, 17, 65), (70, 40, 40, 31), (40, 100, -7, 65)]
# raw towers at 14.3 have logits past +-100; opposed ones lie at -scale, so that every softplus is a tail, or with ids
# that attract a large number
REGIMES = [("unit", 1.0, -0.5), ("unit", 100.0, -10.0), ("raw", 14.3, 5.0), ("opposed", 100.0, 40.0)]
NAMES = ("rows", "cols", "total", "dx", "dy", "dscale", "dbias", "d row_weights", "d col_weights")

GROUPINGS = ("none", "apart", "attract", "one", "one that attracts")


def groups(kind: str, n: int, m: int) -> dict[str, Tensor | bool | None]:
    if kind == "none":
        return {"row_ids": None, "col_ids": None, "attract": True}
    numbers = (torch.arange(n) % 5, torch.arange(m) % 7) if not kind.startswith("one") else (n * [3], m * [3])
    row_ids, col_ids = (torch.as_tensor(t) - 2**62 for t in numbers)
    return {"row_ids": row_ids, "col_ids": col_ids, "attract": "attract" in kind}


def total(rows: Tensor, cols: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return (u * rows).sum() + (v * cols).sum()


@functools.lru_cache(maxsize=2)
def expected(shape: tuple[int, ...], dtype: torch.dtype, kind: str, scale: float, bias: float, grouping: str):
    n, m, first_positive, d = shape
    pair = towers(n, m, d, min(max(first_positive, 0), m - n), kind) if n <= m else towers(m, n, d, 0, kind)[::-1]
    x, y = (t.to(dtype) for t in pair)
    inputs = x, y, torch.tensor(scale), torch.tensor(bias), torch.randn(n), torch.randn(m)
    options = {**groups(grouping, n, m), "first_positive": first_positive}
    eager, truth = [], []
    for out, tensors in ((eager, leaves(*inputs)), (truth, leaves(*inputs, dtype=torch.float64))):
        rows, cols = reference(*tensors[:4], **options)
        value = total(rows, cols, *tensors[4:])
        out += [rows.detach(), cols.detach(), value.detach(), *torch.autograd.grad(value, tensors)]
    with torch.no_grad():  # sums of absolute terms: weights of both signs cancel
        x, y, scale, bias, u, v = (t.double() for t in inputs)
        cosines = x @ y.T
        sign, kept = _signs(n, m, options["row_ids"], options["col_ids"], first_positive, options["attract"], cosines)
        g = kept * (sign * (scale * cosines + bias)).sigmoid() * (u[:, None] + v).abs()
        rows, cols = truth[:2]
        magnitudes = [0.0] * len(NAMES)
        magnitudes[2] = total(rows, cols, u.abs(), v.abs()).item()
        magnitudes[3] = (scale * (g @ y.abs())).max().item()
        magnitudes[4] = (scale * (g.T @ x.abs())).max().item()
        magnitudes[5], magnitudes[6] = (g * cosines.abs()).sum().item(), g.sum().item()
        largest = (scale * cosines + bias).abs().max().item()
    return inputs, options, eager, truth, largest, magnitudes


def check(shape, dtype, kind, scale, bias, grouping, isa) -> None:
    inputs, options, eager, truth, largest, magnitudes = expected(shape, dtype, kind, scale, bias, grouping)
    options = {**options, "backend": "native"}

    def compare(names: tuple[str, ...], actual: list[Tensor]) -> None:
        for name, a in zip(names, actual, strict=True):
            k = NAMES.index(name)
            testing.assert_close(
                name,
                a,
                eager[k],
                truth[k],
                terms=shape[0] + shape[1] + shape[3],
                exponent=largest,
                features=dtype,
                magnitude=magnitudes[k],
            )

    with testing.instruction_set(isa):
        tensors = leaves(*inputs)
        value = dot_softplus(*tensors, **options)
        compare(NAMES[2:], [value.detach(), *torch.autograd.grad(value, tensors)])
        with torch.no_grad():  # one pass of products
            compare(("total",), [dot_softplus(*inputs, **options)])
        tensors = leaves(*inputs)
        rows, cols = dot_softplus_sums(*tensors[:4], **options)
        grads = torch.autograd.grad(total(rows, cols, *inputs[4:]), tensors[:4])
        compare((*NAMES[:2], *NAMES[3:7]), [rows.detach(), cols.detach(), *grads])


@each_pair(shape=SHAPES, dtype=DTYPES, regime=REGIMES, grouping=GROUPINGS, isa=ISAS)
def test_sums_and_gradients(shape, dtype, regime, grouping, isa):
    check(shape, dtype, *regime, grouping, isa)


@each_isa
@pytest.mark.parametrize("grouping", ["none", "attract"])
@each_dtype
def test_several_panels_and_chunks(dtype, grouping, isa):
    check((600, 4200, 90, 33), dtype, "unit", 20.0, -8.0, grouping, isa)


@each_isa
@pytest.mark.parametrize("attract", [False, True])
def test_each_term_keeps_its_digits(attract, isa):
    """Logits of -85 to 100, one to a column: softplus and sigmoid to float32's digits of their own size."""
    logits = torch.linspace(-85, 100, 331)
    bias, y = (
        torch.tensor(0.5),
        torch.cat((torch.zeros(1), logits - 0.5))[:, None].requires_grad_(),
    )  # column 0: positive
    ids = {"row_ids": torch.zeros(1, dtype=int), "col_ids": torch.zeros(332, dtype=int)} if attract else {}
    x, one, t = torch.ones(1, 1), torch.ones(()), y.detach()[1:, 0] + bias
    sign = -1 if attract else 1
    with testing.instruction_set(isa):
        _, cols = dot_softplus_sums(x, y, one, bias, **ids, attract=attract, backend="native")
        (dy,) = torch.autograd.grad(cols.sum(), y)
    truth = torch.logaddexp(sign * t.double(), torch.zeros(331, dtype=torch.float64))
    shown = truth > 1e-36  # beyond that e^-t leaves float32
    torch.testing.assert_close(cols.detach()[1:][shown].double(), truth[shown], rtol=1e-6, atol=0)
    sigmoid = sign * (sign * t.double()).sigmoid()
    torch.testing.assert_close(dy[1:, 0][shown].double(), sigmoid[shown], rtol=1e-6, atol=0)
    assert cols[0] == dy[0] == 0


@each_isa
def test_without_positives(isa):
    """A first positive past the columns: every pair takes part."""
    x, y = towers(40, 70, 33)
    scale, bias = torch.tensor(3.0), torch.tensor(-1.0)
    truth = torch.nn.functional.softplus(3 * x.double() @ y.double().T - 1)
    for first_positive in (70, 71, 2**40, -40, -(2**40)):
        with testing.instruction_set(isa):
            rows, cols = dot_softplus_sums(x, y, scale, bias, first_positive=first_positive, backend="native")
        torch.testing.assert_close(rows.double(), truth.sum(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(cols.double(), truth.sum(0), rtol=1e-6, atol=0)


@each_isa
@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (3,), (1, 2), (4,)])
def test_gradients_that_are_asked_for_and_nothing_else(needs, isa):
    x, y = towers(20, 37, 9)
    inputs = [x, y, torch.tensor(3.0), torch.tensor(-1.0), torch.rand(20), torch.rand(37)]

    def gradients(needs: tuple[int, ...]) -> tuple[Tensor, ...]:
        tensors = [t.clone().requires_grad_(k in needs) for k, t in enumerate(inputs)]
        return torch.autograd.grad(dot_softplus(*tensors, backend="native"), [tensors[k] for k in needs])

    with testing.instruction_set(isa):
        every = gradients(tuple(range(6)))
        for k, grad in zip(needs, gradients(needs), strict=True):
            torch.testing.assert_close(grad, every[k], rtol=1e-6, atol=1e-6)


@each_isa
def test_rows_alone(isa):
    x, y = leaves(*towers(20, 37, 9))
    scale, bias, u = torch.tensor(3.0), torch.tensor(-1.0), torch.rand(20)
    with testing.instruction_set(isa):
        alone = dot_softplus(x, y, scale, bias, u, backend="native")
        both = dot_softplus(x, y, scale, bias, u, torch.zeros(37), backend="native")
        for one, other in zip((alone, *grads(alone, x, y)), (both, *grads(both, x, y)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def grads(out: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, tensors)


@each_isa
@each_dtype
def test_the_number_of_threads_changes_no_bit(dtype, isa):
    x, y = (t.to(dtype) for t in towers(500, 700, 70, 30))
    inputs = x, y, torch.tensor(20.0), torch.tensor(-5.0), torch.randn(500), torch.randn(700)
    results = []
    with testing.instruction_set(isa):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            tensors = leaves(*inputs)
            value = dot_softplus(*tensors, **groups("attract", 500, 700), first_positive=30, backend="native")
            results.append((value, *grads(value, *tensors)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@each_isa
@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_gives_nan(bad, dtype, isa):
    for which in (0, 1, 3):
        x, y = (t.to(dtype) for t in towers(5, 7, 4))
        inputs = [x, y, torch.tensor(3.0), torch.tensor(-1.0)]
        inputs[which].view(-1)[0] = bad
        tensors = leaves(*inputs)
        with testing.instruction_set(isa):
            value = dot_softplus(*tensors, torch.ones(5), torch.ones(7), backend="native")
            for t in (value, *grads(value, *tensors)):
                assert torch.isnan(t).all()
            assert torch.isnan(torch.cat(dot_softplus_sums(*inputs, backend="native"))).all()
