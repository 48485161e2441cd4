"""The additive critic in Triton, compiled for each GPU and executed without one, against float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace

import additive
import pytest
import torch
from additive import check_moments, inputs
from cases import leaves
from executor import emulated

from cibr_kernels.primitives.additive.activations import ACTIVATIONS
from cibr_kernels.primitives.additive.moments import triton as backend
from cibr_kernels.primitives.additive.moments.op import additive_moments
from cibr_kernels.primitives.additive.problem import MomentsProblem

ALL = True, True, True  # gradients
GPUS = (80, 90, 100, 120)
RAGGED, WHOLE = (37, 70, 17, 21), (32, 48, 0, 32)  # n, m, first_positive, h: with blocks of 16, ends or none
STEPS = ("pack", "scores", "merge", "weigh", "gradient", "gradient", "finish")
BACKWARD = ["additive_moments_positives_kernel", "additive_moments_positive_weights_kernel"]
ONE_PANEL = [*(f"additive_moments_{step}_kernel" for step in STEPS), "sums_reduce_kernel"]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 16, so that small inputs have several each way; panels of 32 rows of RAGGED."""
    small = replace(backend.CONFIGS["kinked"], num_warps=1, unroll=2, unroll_gradient=1, block=16, block_h=16)
    monkeypatch.setattr(backend, "CONFIGS", {"kinked": small, "smooth": replace(small, unroll=1)})
    monkeypatch.setattr(backend, "PAD", 16)
    monkeypatch.setattr(backend, "POSITIVES", {"BLOCK_R": 16, "BLOCK_H": 16})
    monkeypatch.setattr(backend, "PANEL_BYTES", 32 * 80 * 2 * 4)
    yield


def check(capability: int, activation: str, shape: tuple, **options) -> list[str]:
    """Holds J, L and the gradients to the rule; the names of the kernels that were launched."""
    with emulated(capability) as gpu:
        check_moments(shape, activation, "triton", **options)
    return [name for name, _ in gpu.launches]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("capability", GPUS)
def test_matches_float64(capability, activation, small_tiles):
    check(capability, activation, RAGGED)
    check(capability, activation, RAGGED, size=60.0)  # panels with another largest score
    if capability in (90, 100):
        check(capability, activation, WHOLE, include=True)


@pytest.mark.parametrize("size", [1.0, 60.0])
@pytest.mark.parametrize(
    ("capability", "activation", "dtype"),
    [
        (80, "relu", torch.float16),
        (90, "relu", torch.bfloat16),
        (100, "relu", torch.bfloat16),
        (120, "relu", torch.float16),
        (90, "gelu", torch.float16),
        (100, "gelu", torch.bfloat16),
    ],
    ids=str,
)
def test_half_precision_is_computed_in_float32(capability, activation, dtype, size, small_tiles):
    check(capability, activation, RAGGED, dtype=dtype, size=size)


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"relu", "gelu"}))
def test_other_activations(activation, small_tiles):
    capability = GPUS[list(ACTIVATIONS).index(activation) % 4]
    for options in ({}, {"size": 60.0}, {"shift": 30.0}):
        check(capability, activation, RAGGED, **options)


@pytest.mark.parametrize("shift", [30.0, -30.0])
def test_large_biases_that_cancel(shift, small_tiles):
    check(90, "relu", RAGGED, shift=shift)


@pytest.mark.parametrize(("capability", "activation"), [(80, "relu"), (90, "gelu")])
def test_the_tiles_that_ship(capability, activation):
    assert check(capability, activation, (70, 130, 5, 67)) == [*ONE_PANEL, *BACKWARD]


def test_sums_in_pieces_where_blocks_are_few(small_tiles):
    check(90, "relu", (16, 300, 0, 9), size=10.0)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_group_of_critics_takes_as_many_launches_as_one(activation, monkeypatch, small_tiles):
    monkeypatch.setattr(backend, "PANEL_BYTES", 3 * 32 * 80 * 2 * 4)
    with emulated(90) as gpu:
        additive.check_group(RAGGED, activation, "triton")
    assert [name for name, _ in gpu.launches] == [ONE_PANEL[0], *ONE_PANEL[1:6] * 2, *ONE_PANEL[6:], *BACKWARD]


@pytest.mark.parametrize("which", [0, 1])
def test_the_backward_of_one_moment(which, small_tiles):
    """The other one's gradient is nothing, not zeros that somebody has made."""
    tensors = inputs(37, 70, 21)
    moments = functools.partial(additive_moments, activation="tanh", first_positive=17)
    with emulated(90):
        own = leaves(*tensors)
        found = torch.autograd.grad(moments(*own, backend="triton")[which], own)
    wide = leaves(*tensors, dtype=torch.float64)
    for got, truth in zip(found, torch.autograd.grad(moments(*wide)[which], wide), strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for(small_tiles):
    a, b, w = inputs(37, 70, 21)
    with emulated(90) as gpu:
        problem = MomentsProblem(a, b, w, "relu", 0.0, 17, False)
        full = backend.forward(problem, ALL)
        for needs in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
            some = backend.forward(problem, needs)
            for got, all_of_it, need in zip(some, full, (True, True, *needs), strict=True):
                if need:
                    torch.testing.assert_close(got, all_of_it, rtol=1e-6, atol=1e-6)
                else:
                    assert got.shape == (0,)
    assert [name for name, _ in gpu.launches[-3:]] == ONE_PANEL[:3]


def test_the_same_bits_twice(small_tiles):
    a, b, w = inputs(37, 70, 21)
    with emulated(90):
        runs = [backend.forward(MomentsProblem(a, b, w, "relu", 0.0, 17, False), ALL) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["a", "b", "w"])
def test_one_bad_number_reaches_everything(where, bad, small_tiles):
    a, b, w = inputs(37, 70, 21)
    tensors = {"a": a, "b": b, "w": w}
    tensors[where].view(-1)[-1] = bad
    with emulated(90):
        outputs = backend.forward(MomentsProblem(*tensors.values(), "relu", 0.0, 0, False), ALL)
    assert all(o.isnan().all() for o in outputs)
