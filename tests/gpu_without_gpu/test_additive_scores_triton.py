"""additive_scores in Triton, compiled for each GPU and executed without one, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from additive import SLOPES, check_scores, inputs
from executor import emulated
from torch import Tensor

from cibr_kernels.primitives.additive.activations import ACTIVATIONS
from cibr_kernels.primitives.additive.moments import triton as moments
from cibr_kernels.primitives.additive.problem import AdditiveProblem
from cibr_kernels.primitives.additive.scores import triton as backend
from cibr_kernels.primitives.additive.scores.op import additive_scores

GPUS = (80, 90, 100, 120)
RAGGED, WHOLE = (37, 70, 21), (32, 48, 32)  # n, m, h: with blocks of 16, ends or none
ALL = (True, True, True)
FORWARD = ["additive_scores_pack_kernel", "additive_scores_forward_kernel"]
GRADIENTS = ["additive_moments_gradient_kernel"] * 2
BACKWARD = [
    "additive_moments_pack_kernel",
    "additive_scores_spread_kernel",
    *GRADIENTS,
    "additive_scores_state_kernel",
    "additive_moments_finish_kernel",
    "sums_reduce_kernel",
]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 16, so that small inputs have several each way; panels of 32 rows of RAGGED."""
    small = replace(moments.CONFIGS["kinked"], num_warps=1, unroll=2, unroll_gradient=1, block=16, block_h=16)
    monkeypatch.setattr(moments, "CONFIGS", {"kinked": small, "smooth": replace(small, unroll=1)})
    monkeypatch.setattr(moments, "PAD", 16)
    monkeypatch.setattr(moments, "PANEL_BYTES", 32 * 80 * 2 * 4)
    yield


def outputs(module, activation: str, grad: Tensor, a: Tensor, b: Tensor, w: Tensor) -> list[Tensor]:
    problem = AdditiveProblem(a, b, w, activation, SLOPES.get(activation, 0.0))
    return [module.forward(problem), *module.backward(grad, problem, ALL)]


def check(capability: int, activation: str, shape: tuple, **options) -> list[str]:
    """Holds S and the gradients to the rule; the names of the kernels that were launched."""
    with emulated(capability) as gpu:
        check_scores(shape, activation, "triton", **options)
    return [name for name, _ in gpu.launches]


@pytest.mark.parametrize(
    ("capability", "activation"), [*((capability, "relu") for capability in GPUS), (80, "gelu"), (100, "gelu")]
)
def test_matches_float64(capability, activation, small_tiles):
    check(capability, activation, RAGGED, size=60.0)
    if capability == 90:
        check(capability, activation, WHOLE)


@pytest.mark.parametrize(
    ("capability", "activation", "dtype"),
    [(80, "relu", torch.float16), (100, "relu", torch.bfloat16), (120, "gelu", torch.float16)],
    ids=str,
)
def test_half_precision_is_computed_in_float32(capability, activation, dtype, small_tiles):
    check(capability, activation, RAGGED, dtype=dtype)


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"relu", "gelu"}))
def test_other_activations(activation, small_tiles):
    capability = GPUS[list(ACTIVATIONS).index(activation) % 4]
    for shift in (0.0, 30.0):
        check(capability, activation, RAGGED, shift=shift)


@pytest.mark.parametrize("shift", [30.0, -30.0])
def test_large_biases_that_cancel(shift, small_tiles):
    check(90, "relu", RAGGED, shift=shift)


def test_the_tiles_that_ship():
    assert check(80, "relu", (70, 130, 67)) == [*FORWARD, *BACKWARD]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 3), (40, 1, 17)])
def test_thin(shape, small_tiles):
    check(90, "tanh", shape)


def test_panels(small_tiles):
    panel = BACKWARD[1:4]
    assert check(90, "relu", RAGGED)[2:] == [BACKWARD[0], *panel, *panel, *BACKWARD[4:]]


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_only_what_is_asked_for(activation, small_tiles):
    grad, a, b, w = torch.randn(37, 70), *inputs(*RAGGED)
    with emulated(90):
        problem = AdditiveProblem(a, b, w, activation, 0.0)
        full = backend.backward(grad, problem, ALL)
        for needs in ((True, False, False), (False, True, False), (False, False, True)):
            some = backend.backward(grad, problem, needs)
            for got, all_of_it, need in zip(some, full, needs, strict=True):
                if need:
                    torch.testing.assert_close(got, all_of_it, rtol=1e-6, atol=1e-6)
                else:
                    assert got.shape == (0,)


def test_the_operator(small_tiles):
    """Autograd's grad is not contiguous where the loss is a sum over one direction."""
    a, b, w = (t.bfloat16() for t in inputs(*RAGGED))
    found = []
    for name in ("triton", "reference"):
        own = [t.clone().requires_grad_() for t in (a, b, w)]
        with emulated(90):
            s = additive_scores(*own, activation="silu", backend=name)
            found.append([s.detach(), *torch.autograd.grad(s.logsumexp(1).sum() + s.sum(0).mean(), own)])
    for got, expected in zip(*found, strict=True):
        assert got.dtype == expected.dtype and got.is_contiguous()
        torch.testing.assert_close(got, expected)


def test_the_same_bits_twice(small_tiles):
    tensors = torch.randn(37, 70), *inputs(*RAGGED)
    with emulated(90):
        runs = [outputs(backend, "relu", *tensors) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_one_bad_number_reaches_its_rows_of_scores_and_every_gradient(where, bad, small_tiles):
    tensors = torch.randn(37, 70), *inputs(*RAGGED)
    tensors[where].view(-1)[-1] = bad
    with emulated(90):
        s, *gradients = outputs(backend, "relu", *tensors)
    spoilt = torch.zeros_like(s, dtype=torch.bool)
    if where:
        spoilt[{1: (-1, slice(None)), 2: (slice(None), -1), 3: ...}[where]] = True
    assert torch.equal(s.isnan(), spoilt)
    assert all(g.isnan().all() for g in gradients)
