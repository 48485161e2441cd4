"""additive_moments and additive_shifts in CUDA C++: what their launchers launch, emulated, against float64."""

from __future__ import annotations

import math

import additive
import nvcc
import pytest
import torch
from additive import inputs
from cases import with_gradients
from plans import emulated

from cibr_kernels.dispatch import backends
from cibr_kernels.primitives.additive.activations import ACTIVATIONS
from cibr_kernels.primitives.additive.moments import native
from cibr_kernels.primitives.additive.moments.reference import additive_moments as moments_reference
from cibr_kernels.primitives.additive.problem import MomentsProblem
from cibr_kernels.primitives.additive.shifts.op import additive_shifts

pytestmark = pytest.mark.skipif(
    bool(backends.cuda_missing()) or nvcc.find() is None, reason=backends.cuda_missing() or "nvcc was not found"
)
TARGETS = ["80", "90a", "100a", "120"]


def check_moments(arch: str, activation: str, shape: tuple, **options) -> list[tuple[str, tuple[int, ...]]]:
    """Holds J, L and the gradients to the rule; -> (kernel, grid) of what was launched."""
    with emulated(arch) as e:
        additive.check_moments(shape, activation, "native", **options)
    return e.launches


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("arch", TARGETS)
def test_moments_on_every_target(arch, activation):
    check_moments(arch, activation, (20, 70, 17, 33))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_moments_of_every_activation(activation):
    check_moments("90a", activation, (33, 33, 0, 16), include=True)


@pytest.mark.parametrize(
    ("activation", "dtype", "budget"),
    [("relu", torch.float32, 1 << 20), ("silu", torch.float32, 1), ("leaky_relu", torch.bfloat16, 1 << 20)],
    ids=str,
)
def test_a_group_of_critics_takes_as_many_launches_as_one(activation, dtype, budget, monkeypatch):
    monkeypatch.setattr(native, "SCORE_BUDGET", budget)  # of 1: panels of 128 rows
    shape = (20, 70, 17, 33) if budget > 1 else (130, 140, 3, 5)
    with emulated("90a") as e:
        additive.check_group(shape, activation, "native", dtype=dtype)
    names = [name for name, _ in e.launches]
    if budget > 1:
        assert len(names) == 13 and names[-2:] == [
            f"additive_moments_positives_{activation}_kernel",
            "additive_moments_positive_weights_kernel",
        ]
    assert (
        all("fold" not in name for name in names) or budget == 1
    )  # a single panel's parts are added as they are scaled


@pytest.mark.parametrize("include", [False, True])
def test_moments_in_several_panels_and_parts(include, monkeypatch):
    monkeypatch.setattr(native, "SCORE_BUDGET", 1)  # 128 rows at a time
    launches = check_moments("90a", "relu", (130, 257, 100, 65), include=include)
    assert [grid for name, grid in launches if name == "additive_moments_scores_relu_kernel"] == [(3, 1, 1)] * 2
    rows = [grid for name, grid in launches if name == "additive_moments_rows_relu_kernel"]
    assert any(grid[2] > 1 for grid in rows)  # the sum cut into parts


def test_smooth_moments_in_several_panels(monkeypatch):
    monkeypatch.setattr(native, "SCORE_BUDGET", 1)
    check_moments("90a", "silu", (129, 131, 2, 5), size=60.0)  # panels with another largest score


@pytest.mark.parametrize(("activation", "shift"), [("relu", 30.0), ("leaky_relu", -30.0)])
def test_large_biases_that_cancel(activation, shift):
    check_moments("90a", activation, (20, 70, 17, 65), shift=shift)


@pytest.mark.parametrize(
    ("arch", "activation", "dtype"),
    [
        ("80", "relu", torch.bfloat16),
        ("90a", "relu", torch.float16),
        ("90a", "leaky_relu", torch.bfloat16),
        ("90a", "tanh", torch.bfloat16),
    ],
    ids=str,
)
def test_moments_of_half_precision_features(arch, activation, dtype):
    check_moments(arch, activation, (20, 70, 17, 33), dtype=dtype, size=60.0)


@pytest.mark.parametrize(
    ("activation", "needs"),
    [
        ("relu", (0, 0, 0)),
        ("relu", (1, 0, 0)),
        ("relu", (0, 1, 0)),
        ("relu", (0, 0, 1)),
        ("silu", (0, 1, 0)),
        ("silu", (0, 0, 1)),
        ("silu", (1, 1, 0)),
    ],
    ids=str,
)
def test_only_what_is_needed_is_computed(activation, needs):
    a, b, w = inputs(9, 12, 6)
    expected = with_gradients(
        lambda *t: moments_reference(*t, activation, 0.0, 2), a, b, w, weights=(0, 1), dtype=torch.float64
    )
    with emulated("90a") as e:
        j, el, *gradients = native.forward(MomentsProblem(a, b, w, activation, 0.0, 2, False), tuple(map(bool, needs)))
    for got, truth in zip([j, el], expected[:2], strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)
    for need, got, truth in zip(needs, gradients, expected[2:], strict=True):
        assert got.numel() == need * truth.numel()
        if need:
            torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)
    names = [name for name, _ in e.launches]
    assert any("rows" in n for n in names) == bool(needs[0] or needs[2])
    assert any("columns" in n for n in names) == bool(needs[1] or (needs[2] and activation == "relu"))


@pytest.mark.parametrize(
    ("activation", "place", "bad"),
    [
        ("relu", 0, math.nan),
        ("relu", 0, -math.inf),
        ("relu", 1, math.inf),
        ("relu", 2, math.inf),
        ("elu", 0, math.nan),
        ("elu", 1, -math.inf),
        ("elu", 2, math.nan),
    ],
)
def test_nan_and_infinity_reach_every_output(activation, place, bad):
    tensors = inputs(5, 6, 3)
    tensors[place].view(-1)[1] = bad
    with emulated("90a"):
        outputs = native.forward(MomentsProblem(*tensors, activation, 0.5, 1, False), (True, True, True))
    assert all(x.isnan().all() for x in outputs)


def test_relu_is_flat_at_zero():
    a, b, w = torch.zeros(4, 32), torch.zeros(4, 32), torch.ones(32)  # phi'(0) = 0, as in PyTorch
    with emulated("90a"):
        _, _, *gradients = native.forward(MomentsProblem(a, b, w, "relu", 0.0, 0, False), (True, True, True))
    assert not any(g.any() for g in gradients)


def check_shifts(arch: str, activation: str, shape: tuple, first: int, k: int, dtype=torch.float32) -> None:
    with emulated(arch):
        additive.check_shifts((*shape, first, k), activation, "native", dtype=dtype)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("arch", TARGETS)
def test_shifts_on_every_target(arch, activation):
    check_shifts(arch, activation, (20, 23, 132), 1, 5)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_shifts_of_every_activation(activation):
    check_shifts("90a", activation, (9, 9, 7), 1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "first", "k"), [((140, 200, 20), 3, 6), ((3, 5, 4), 0, 12), ((1, 1, 1), 0, 1)])
def test_shifts_wrap(shape, first, k, dtype):
    check_shifts("90a", "relu", shape, first, k, dtype)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_reach_the_scores_of_their_shifts(activation, bad):
    a, b, w = inputs(6, 6, 5)
    a[2, 3] = bad
    with emulated("90a"):
        scores = additive_shifts(a, b, w, 2, activation=activation, slope=0.3, backend="native")
    assert scores[:, 2].isnan().all() and scores.isnan().sum() == 2
