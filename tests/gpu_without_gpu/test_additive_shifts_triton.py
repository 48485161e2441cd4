"""additive_shifts in Triton, compiled for each GPU and executed without one, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from additive import check_shifts as check
from additive import inputs
from cases import DTYPES
from executor import emulated

from cibr_kernels.primitives.additive.activations import ACTIVATIONS
from cibr_kernels.primitives.additive.problem import ShiftsProblem
from cibr_kernels.primitives.additive.shifts import triton as backend

CASES = [(37, 37, 40, 0, 7), (20, 27, 65, 0, 8), (16, 16, 16, 1, 3), (33, 33, 33, 30, 6)]  # n, m, h, first, k
KERNELS = ["additive_shifts_scores_kernel", *["additive_shifts_gradient_kernel"] * 2, "sums_reduce_kernel"]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and of the width, at four warps of them."""
    monkeypatch.setattr(backend, "TILE", {"BLOCK_R": 8, "BLOCK_H": 32})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("capability", "activation"), [(c, x) for c in (80, 90, 100, 120) for x in ("relu", "gelu")])
def test_matches_float64(capability, activation, dtype, small_tiles):
    for case in CASES if dtype == torch.float32 and capability == 90 else CASES[:2]:
        for size in (1.0, 60.0):
            with emulated(capability) as gpu:
                check(case, activation, "triton", size, dtype)
            assert [name for name, _ in gpu.launches] == KERNELS


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"relu", "gelu"}))
def test_other_activations(activation, small_tiles):
    with emulated((80, 90, 100, 120)[list(ACTIVATIONS).index(activation) % 4]):
        check(CASES[1], activation, "triton")


def test_more_shifts_than_a_grid_has_room_for(small_tiles, monkeypatch):
    monkeypatch.setattr(backend, "MOST_SHIFTS", 3)
    with emulated(90) as gpu:
        check(CASES[0], "relu", "triton")
    assert [grid[1] for name, grid in gpu.launches if name == KERNELS[0]] == [3, 3, 1]


def test_the_tile_that_ships():
    with emulated(90):
        check((35, 35, 150, 1, 4), "relu", "triton")


def test_nan_reaches_the_scores_it_takes_part_in():
    a, b, w = inputs(6, 6, 4)
    b[2, 1] = math.nan
    i = torch.arange(6)
    for activation in ("relu", "elu"):
        with emulated(90):
            scores = backend.forward(ShiftsProblem(a, b, w, activation, 1.0, 1, 2))
        assert torch.equal(scores.isnan(), torch.stack([(i + s) % 6 == 2 for s in (1, 2)]))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_asked_for(needs, small_tiles):
    a, b, w = inputs(20, 27, 65)
    grad = torch.randn(8, 20)
    with emulated(90):
        problem = ShiftsProblem(a, b, w, "relu", 0.0, 0, 8)
        full = backend.backward(grad, problem, (True, True, True))
        some = backend.backward(grad, problem, needs)
    for got, all_of_it, need in zip(some, full, needs, strict=True):
        assert torch.equal(got, all_of_it) if need else got.shape == (0,)
