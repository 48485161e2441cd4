"""The registered operators: PyTorch's own checks, and compiled graphs equal to eager."""

from __future__ import annotations

import nvtx
import pytest
import torch
from cases import LARGE, leaves, towers
from covering import each_pair
from torch import Tensor
from torch.library import opcheck

import cibr_kernels as ck
from cibr_kernels.dispatch import backends

OPS = torch.ops.cibr_kernels
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")

BACKENDS = ["reference", "native"] if ck.native_available() else ["reference"]
DTYPES = [torch.float32, torch.bfloat16]
NEEDS = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]


def features(n: int = 5, m: int = 7, d: int = 3) -> list[Tensor]:
    return leaves(*towers(n, m, d))


@each_pair(
    form=[(True, True, 0), (True, False, 0), (True, True, LARGE), (False, True, 0)],  # mask, need_cols, budget
    ids=[False, True],  # with ids also the maxima
    dtype=DTYPES,
    backend=BACKENDS,
)
def test_dot_lse(form, ids, dtype, backend):
    mask, need_cols, budget = form
    x, y = leaves(*features(), dtype=dtype)
    scale = torch.tensor(3.0, requires_grad=True)
    # without kept exponentials their shift is NaN, which the last check takes for a difference
    checks = CHECKS if budget and backend == "native" else CHECKS[:3]
    groups = (torch.arange(5) % 3, torch.arange(7) % 4) if ids else (None, None)
    limits = None if need_cols else torch.linspace(-1.0, 3.0, 5)
    arguments = x, y, scale, *groups, limits, 1, mask, need_cols, ids, budget, backend
    opcheck(OPS.dot_lse_forward, arguments, test_utils=checks)
    saved = OPS.dot_lse_forward(*arguments)
    grads = [torch.ones_like(t) for t in saved[:3]]
    for need_dx, need_dy in ((True, True), (True, False), (False, True)):
        arguments = *grads, x, y, scale, *groups, limits, *saved[:3], *saved[5:], 1, mask, need_dx, need_dy, backend
        opcheck(OPS.dot_lse_backward, tuple(detached(arguments)), test_utils=CHECKS)


@each_pair(
    needs=[(True, True), (True, False), (False, True), (False, False)],
    cols=[False, True],
    ids=[False, True],
    dtype=DTYPES,
    backend=BACKENDS,
)
def test_dot_softplus(needs, cols, ids, dtype, backend):
    x, y = (t.requires_grad_(need) for t, need in zip(leaves(*features(), dtype=dtype), needs, strict=True))
    scale, bias, u = leaves(torch.tensor(3.0), torch.tensor(-1.0), torch.rand(5))
    v = leaves(torch.rand(7))[0] if cols else None
    if needs == (False, False):
        scale, bias = scale.detach(), bias.detach()
    groups = (torch.arange(5) % 3, torch.arange(7) % 4) if ids else (None, None)
    options = *groups, 1, ids
    opcheck(OPS.dot_softplus_total, (x, y, scale, bias, u, v, *options, *needs, backend), test_utils=CHECKS)
    opcheck(OPS.dot_softplus_forward, (x, y, scale, bias, *options, cols, backend), test_utils=CHECKS)
    if any(needs):
        arguments = torch.ones(5), torch.ones(7 if cols else 0), x, y, scale, bias, *options, *needs, backend
        opcheck(OPS.dot_softplus_backward, tuple(detached(arguments)), test_utils=CHECKS)


@each_pair(needs=NEEDS, dtype=DTYPES, backend=BACKENDS)
def test_additive_scores(needs, dtype, backend):
    inputs = [
        t.requires_grad_(need) for t, need in zip(leaves(*features(), torch.randn(3), dtype=dtype), needs, strict=True)
    ]
    opcheck(OPS.additive_scores_forward, (*inputs, "gelu", 0.0, backend), test_utils=CHECKS)
    arguments = torch.ones(5, 7), *inputs, "gelu", 0.0, *needs, backend
    opcheck(OPS.additive_scores_backward, tuple(detached(arguments)), test_utils=CHECKS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", NEEDS)
def test_additive_moments(needs, backend):
    (w,) = leaves(torch.randn(3))
    (bias,) = leaves(torch.randn(()))
    a, b = features()
    inputs = [t.requires_grad_(need) for t, need in zip((a, b, w), needs, strict=True)]
    opcheck(OPS.additive_moments_forward, (*inputs, bias, "gelu", 0.0, 1, False, *needs, backend), test_utils=CHECKS)
    *_, da, db, dw = OPS.additive_moments_forward(*inputs, bias, "gelu", 0.0, 1, False, *needs, backend)
    arguments = torch.ones(()), torch.ones(()), *inputs, da, db, dw, "gelu", 0.0, 1, *needs, backend
    opcheck(OPS.additive_moments_backward, tuple(detached(arguments)), test_utils=CHECKS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_log_mean_exp(masked, backend):
    (scores,) = leaves(torch.randn(4, 6))
    mask = torch.rand(4, 6) < 0.5 if masked else None
    opcheck(OPS.log_mean_exp_forward, (scores, mask, backend), test_utils=CHECKS)
    el = OPS.log_mean_exp_forward(scores, mask, backend)
    opcheck(OPS.log_mean_exp_backward, tuple(detached((torch.ones(()), scores, mask, el, backend))), test_utils=CHECKS)


class Profiler:
    """Stands in for an nvtx domain."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def push_range(self, name: str) -> None:
        self.events.append(name)

    def pop_range(self) -> None:
        self.events.append("end")


def test_profilers_see_a_range_for_each_operator(monkeypatch):
    profiler = Profiler()
    monkeypatch.setattr(backends, "_range", lambda name: (profiler, name))
    ck.set_stash_budget(0)
    ck.clip_loss(*features(m=5), 3.0).backward()
    assert profiler.events == ["dot_lse_forward", "end", "dot_lse_backward", "end"]
    if ck.native_available():  # a small batch's gradients are made with its loss
        profiler.events.clear()
        ck.set_stash_budget(LARGE)
        ck.clip_loss(*features(m=5), 3.0).backward()
        assert profiler.events == ["clip_loss_forward", "end"]


def test_a_range_ends_where_its_operator_fails(monkeypatch):
    def fail(*args):
        raise RuntimeError("out of order")

    profiler = Profiler()
    monkeypatch.setattr(backends, "_range", lambda name: (profiler, name))
    monkeypatch.setattr("cibr_kernels.primitives.log_mean_exp.reference.forward", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        ck.log_mean_exp(torch.ones(3), backend="reference")
    assert profiler.events == ["log_mean_exp_forward", "end"]


def test_ranges_are_asked_of_nvtx_in_a_domain_of_ours(monkeypatch):
    """Without a profiler nvtx hands out a domain that does nothing, so what it is asked is recorded on the way."""
    calls: list[tuple] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.domain = get_domain(name)
            calls.append(("domain", name))

        def get_event_attributes(self, message: str):
            calls.append(("attributes", message))
            return self.domain.get_event_attributes(message)

        def push_range(self, attributes) -> None:
            calls.append(("push",))
            self.domain.push_range(attributes)

        def pop_range(self) -> None:
            calls.append(("pop",))
            self.domain.pop_range()

    get_domain = nvtx.get_domain
    monkeypatch.setattr(nvtx, "get_domain", Recorded)
    backends._range.cache_clear()
    try:
        for _ in range(2):
            ck.log_mean_exp(torch.randn(3, 4))
    finally:
        backends._range.cache_clear()
    made = [("domain", "cibr_kernels"), ("attributes", "log_mean_exp_forward")]
    assert calls == [*made, ("push",), ("pop",), ("push",), ("pop",)]


def detached(arguments: tuple) -> list:
    return [a.detach() if isinstance(a, Tensor) else a for a in arguments]
