"""Every op and backend on a real GPU: against float64 by the one rule, with no stall, in a CUDA graph, twice the same.

The same functions run on the CPU's backends, so that they cannot rot where there is no GPU.
"""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode, on in every test, asks cuBLAS for it

import pytest
import torch
from additive import expected_moments
from cases import LARGE, each_dtype, leaves, towers
from rectangular import rectangular_clip_loss
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels import testing
from cibr_kernels.losses.clip.reference import clip_loss as clip_reference
from cibr_kernels.primitives.additive.moments.op import additive_moments
from cibr_kernels.primitives.additive.moments.reference import additive_moments as moments_reference
from cibr_kernels.primitives.additive.scores.op import additive_scores
from cibr_kernels.primitives.additive.scores.reference import additive_scores as scores_reference
from cibr_kernels.primitives.additive.shifts.op import additive_shifts
from cibr_kernels.primitives.additive.shifts.reference import additive_shifts as shifts_reference
from cibr_kernels.primitives.dot.lse.op import dot_lse
from cibr_kernels.primitives.dot.lse.reference import dot_lse as lse_reference
from cibr_kernels.primitives.dot.softplus.op import dot_softplus, dot_softplus_sums
from cibr_kernels.primitives.dot.softplus.reference import dot_softplus as softplus_reference
from cibr_kernels.primitives.log_mean_exp.reference import log_mean_exp as mean_reference

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
IN_CUDA = ("moments", "shifts")  # the ops that csrc/*/cuda.cu has


class Op(NamedTuple):
    """Inputs in float32 on the CPU; the op and its definition give a scalar."""

    inputs: tuple[Tensor, ...]
    ours: Callable[..., Tensor]  # (*inputs, backend)
    definition: Callable[..., Tensor]
    terms: int
    exponent: float


def clip(n: int, m: int, d: int, first_positive: int, scale: float, budget: int) -> Op:
    def ours(x: Tensor, y: Tensor, s: Tensor, backend: str) -> Tensor:
        ck.set_stash_budget(budget)
        return rectangular_clip_loss(x, y, s, first_positive=first_positive, one_way=False, backend=backend)

    def definition(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return clip_reference(x, y, s, first_positive, False)

    return Op((*towers(n, m, d, first_positive), torch.tensor(scale)), ours, definition, m + d, scale)


def groups(n: int, m: int, d: int, first_positive: int, scale: float, budget: int, mask: bool = True) -> Op:
    """The sums and the maxima of dot_lse with ids; the columns of two groups are nobody's."""

    def total(sums: Callable[..., tuple[Tensor, ...]], x: Tensor, y: Tensor, s: Tensor, **how: str) -> Tensor:
        row_ids, col_ids = torch.arange(n, device=x.device) % 7, torch.arange(m, device=x.device) % 9
        found = sums(
            x,
            y,
            s,
            row_ids=row_ids,
            col_ids=col_ids,
            first_positive=first_positive,
            mask_positives=mask,
            need_max=True,
            **how,
        )
        return sum(weight * t.mean() for weight, t in zip((1.0, 0.7, -1.3, 0.4, 0.6), found, strict=True))

    def ours(x: Tensor, y: Tensor, s: Tensor, backend: str) -> Tensor:
        ck.set_stash_budget(budget)
        return total(dot_lse, x, y, s, backend=backend)

    inputs = (*towers(n, m, d, first_positive), torch.tensor(scale))
    return Op(inputs, ours, lambda *t: total(lse_reference, *t), m + d, scale)


def softplus(n: int, m: int, d: int, first_positive: int, scale: float, ids: bool, attract: bool, sums: bool) -> Op:
    """Of every row and every second column, with the weights known before the pass or (sums) not."""

    def how(x: Tensor) -> dict[str, Any]:
        rows, cols = torch.arange(n, device=x.device) % 7, torch.arange(m, device=x.device) % 9
        return {
            "row_ids": rows if ids else None,
            "col_ids": cols if ids else None,
            "first_positive": first_positive,
            "attract": attract,
        }

    def weights(x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        cols = torch.arange(m, device=x.device) % 2 / m
        return torch.full((n,), 1 / n, device=x.device, dtype=like.dtype), cols.to(like.dtype)

    def ours(x: Tensor, y: Tensor, s: Tensor, bias: Tensor, backend: str) -> Tensor:
        u, v = weights(x, s)
        if not sums:
            return dot_softplus(x, y, s, bias, u, v, **how(x), backend=backend)
        rows, cols = dot_softplus_sums(x, y, s, bias, **how(x), backend=backend)
        return (rows * u).sum() + (cols * v).sum()

    def definition(x: Tensor, y: Tensor, s: Tensor, bias: Tensor) -> Tensor:
        (u, v), (rows, cols) = weights(x, s), softplus_reference(x, y, s, bias, **how(x))
        return (rows * u).sum() + (cols * v).sum()

    inputs = (*towers(n, m, d, first_positive), torch.tensor(scale), torch.tensor(-scale / 2))
    return Op(inputs, ours, definition, m + d, 1.5 * scale)


def pair_scores(activation: str, size: float) -> Op:
    """InfoNCE of an additive critic's scores."""
    inputs, *_, exponent, _ = expected_moments((130, 200, 0, 70), activation, size, 0.0, False)

    def loss(s: Tensor) -> Tensor:
        return s.logsumexp(1).mean() - s.diagonal().mean()

    return Op(
        inputs,
        lambda a, b, w, backend: loss(additive_scores(a, b, w, activation=activation, slope=0.2, backend=backend)),
        lambda a, b, w: loss(scores_reference(a, b, w, activation, 0.2)),
        400,
        exponent,
    )


def moments(activation: str, shape: tuple[int, int, int, int], size: float) -> Op:
    n, m, first_positive, h = shape
    inputs, *_, exponent, _ = expected_moments(shape, activation, size, 0.0, False)

    def ours(a: Tensor, b: Tensor, w: Tensor, backend: str) -> Tensor:
        j, el = additive_moments(
            a, b, w, activation=activation, slope=0.2, first_positive=first_positive, backend=backend
        )
        return 0.7 * j - 1.3 * el

    def definition(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        j, el = moments_reference(a, b, w, activation, 0.2, first_positive)
        return 0.7 * j - 1.3 * el

    return Op(inputs, ours, definition, n + m + h, exponent)


def shifted(activation: str) -> Op:
    inputs, *_, exponent, _ = expected_moments((300, 310, 0, 70), activation, 1.0, 0.0, False)
    return Op(
        inputs,
        lambda a, b, w, backend: additive_shifts(a, b, w, 9, activation=activation, backend=backend).logsumexp((0, 1)),
        lambda a, b, w: shifts_reference(a, b, w, 9, 1, activation).logsumexp((0, 1)),
        380,
        exponent,
    )


def mean_of(scale: float, masked: bool) -> Op:
    scores = scale * torch.randn(313, 129, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(scores.shape, generator=torch.Generator().manual_seed(2)) < 0.3 if masked else None
    copied = functools.cache(lambda device: None if mask is None else mask.to(device))  # a copy waits for the device
    return Op(
        (scores,),
        lambda s, backend: ck.log_mean_exp(s, mask=copied(s.device), backend=backend),
        lambda s: mean_reference(s, mask),
        scores.numel(),
        scores.abs().max().item(),
    )


OPS: dict[str, Callable[[], Op]] = {
    "clip ragged": lambda: clip(257, 390, 100, 70, 14.3, 0),
    "clip whole, kept": lambda: clip(512, 512, 128, 0, 100.0, LARGE),
    "clip of 100, kept": lambda: clip(300, 300, 64, 0, 100.0, LARGE),
    "groups ragged": lambda: groups(257, 390, 100, 70, 14.3, 0, mask=False),
    "groups of 100, kept": lambda: groups(300, 300, 64, 0, 100.0, LARGE),
    "groups online": lambda: groups(257, 390, 160, 70, 150.0, 0),
    "softplus ragged": lambda: softplus(257, 390, 100, 70, 10.0, False, False, False),
    "softplus of groups": lambda: softplus(300, 300, 64, 0, 10.0, True, False, False),
    "softplus of groups that attract": lambda: softplus(257, 390, 100, 70, 10.0, True, True, False),
    "softplus sums": lambda: softplus(257, 390, 160, 70, 60.0, True, True, True),
    "scores relu": lambda: pair_scores("relu", 1.0),
    "scores silu large": lambda: pair_scores("silu", 30.0),
    "moments relu": lambda: moments("relu", (200, 330, 17, 130), 1.0),
    "moments relu large": lambda: moments("relu", (128, 256, 0, 64), 60.0),
    "moments gelu": lambda: moments("gelu", (200, 330, 17, 130), 1.0),
    "moments tanh large": lambda: moments("tanh", (130, 130, 0, 65), 60.0),
    "shifts relu": lambda: shifted("relu"),
    "shifts silu": lambda: shifted("silu"),
    "mean": lambda: mean_of(100.0, False),
    "mean masked": lambda: mean_of(1.0, True),
}


def _places(names: Iterable[str], cpu: bool) -> Any:
    """Every op on the CPU, where asked, and on the GPU with each backend that it has there."""
    found = []
    for name in names:
        backends = ("native", "triton") if name.startswith(IN_CUDA) else ("triton",)
        found += [pytest.param(name, ("cpu", "auto"), id=f"{name}-cpu")] if cpu else []
        found += [pytest.param(name, ("cuda", b), id=f"{name}-{b}", marks=GPU) for b in backends]
    return pytest.mark.parametrize(("name", "place"), found)


anywhere, on_gpu = _places(OPS, cpu=True), _places(OPS, cpu=False)


def value_and_gradients(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], device: str = "cpu") -> list[Tensor]:
    own = leaves(*(t.to(device) for t in inputs))
    value = f(*own)
    return [value.detach(), *torch.autograd.grad(value, own)]


@each_dtype
@anywhere
def test_matches_float64(name, place, dtype):
    device, backend = place
    op = OPS[name]()
    features = tuple(t.to(dtype) if t.dim() else t for t in op.inputs)
    actual = value_and_gradients(lambda *t: op.ours(*t, backend=backend), features, device)
    eager = value_and_gradients(op.definition, features)
    truth = value_and_gradients(op.definition, tuple(t.double() for t in features))
    for what, a, e, t in zip(("value", "first", "second", "third", "fourth"), actual, eager, truth, strict=False):
        magnitude = max(1.0, t.abs().max().item()) if t.dim() < 2 else 0.0  # scalars and dw are sums that cancel
        testing.assert_close(
            what, a.cpu(), e, t, terms=op.terms, exponent=op.exponent, features=dtype, magnitude=magnitude
        )


@each_dtype
@pytest.mark.parametrize("op", [clip, softplus], ids=lambda f: f.__name__)
@pytest.mark.parametrize("place", [pytest.param("cuda", marks=GPU)])
def test_more_rows_than_a_panel_has(op, place, dtype):
    """Sums that go on from panel to panel, those of the vendor's matmuls too; float64 on the device."""
    options = (14.3, 0) if op is clip else (10.0, False, False, False)
    inputs, ours, definition, terms, exponent = op(4300, 4500, 160, 100, *options)
    features = tuple((t.to(dtype) if t.dim() else t).to(place) for t in inputs)
    actual = value_and_gradients(lambda *t: ours(*t, backend="triton"), features, place)
    eager = value_and_gradients(definition, features, place)
    truth = value_and_gradients(definition, tuple(t.double() for t in features), place)
    for what, a, e, t in zip(("value", "first", "second", "third", "fourth"), actual, eager, truth, strict=False):
        magnitude = max(1.0, t.abs().max().item()) if t.dim() < 2 else 0.0
        testing.assert_close(what, a, e, t, terms=terms, exponent=exponent, features=dtype, magnitude=magnitude)


@anywhere
def test_the_same_bits_twice(name, place):
    device, backend = place
    op = OPS[name]()
    runs = [value_and_gradients(lambda *t: op.ours(*t, backend=backend), op.inputs, device) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@_places([name for name in OPS if "masked" not in name], cpu=True)
def test_a_nan_reaches_the_value(name, place):
    device, backend = place
    op = OPS[name]()
    spoilt = op.inputs[0].clone()
    spoilt[0, 0] = math.nan
    value, *_ = value_and_gradients(lambda *t: op.ours(*t, backend=backend), (spoilt, *op.inputs[1:]), device)
    assert value.isnan()


@on_gpu
def test_nothing_waits_for_the_device(name, place):
    device, backend = place
    op = OPS[name]()
    own = leaves(*(t.to(device) for t in op.inputs))
    torch.autograd.grad(op.ours(*own, backend=backend), own)  # compiles, loads and fills caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients = torch.autograd.grad(op.ours(*own, backend=backend), own)
        with pytest.raises(RuntimeError, match="synchroniz"):  # what a wait would have been
            gradients[0].sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(g.isfinite().all() for g in gradients)


@on_gpu
def test_in_a_cuda_graph(name, place):
    device, backend = place
    op = OPS[name]()
    own = leaves(*(t.to(device) for t in op.inputs))
    other = [t.to(device) if t.dim() == 0 else t.flip(0).contiguous().to(device) for t in op.inputs]
    expected = value_and_gradients(lambda *t: op.ours(*t, backend=backend), tuple(other), device)

    def step() -> list[Tensor]:
        value = op.ours(*own, backend=backend)
        return [value.detach(), *torch.autograd.grad(value, own)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t, value in zip(own, other, strict=True):
            t.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("negatives", ["all", ck.shifts(4)], ids=str)
def test_the_whole_objective_waits_for_nothing(negatives):
    loss = ck.nn.CIBRLoss(64, 48, 40, hidden=128, negatives=negatives, warmup_steps=1).cuda()
    image, text = (torch.nn.functional.normalize(torch.randn(256, 64, device="cuda"), dim=1) for _ in range(2))
    image.requires_grad_()
    data = torch.randn(256, 48, device="cuda"), torch.randn(256, 40, device="cuda")
    scale = torch.tensor(10.0, device="cuda", requires_grad=True)
    loss(image, text, scale, *data).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(image, text, scale, *data).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert image.grad is not None and image.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("estimator", ["views", "groups", "ceb"])
def test_objectives_without_an_adversary_are_the_cpus_and_wait_for_nothing(estimator):
    torch.manual_seed(0)
    cpu = [torch.nn.functional.normalize(torch.randn(96, 32), dim=1) for _ in range(4)]
    data, ids = (torch.randn(96, 24), torch.randn(96, 20)), torch.arange(96) % 30
    module = ck.nn.CIBRLoss(32, 24, 20, hidden=16, estimator="ceb" if estimator == "ceb" else "variance")
    found = []
    for device in ("cpu", "cuda"):
        placed = copy.deepcopy(module).to(device)
        zv, zt, zv2, zt2 = (z.to(device).requires_grad_() for z in cpu)
        views = {"image_features2": zv2, "text_features2": zt2} if estimator == "views" else {}
        options = {"group_ids": ids.to(device)} if estimator == "groups" else views
        inputs, scale = [x.to(device) for x in data], torch.tensor(5.0, device=device)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = placed(zv, zt, scale, *inputs, output_dict=True, diagnostics=True, **options)
            out["loss"].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append({"gradient": zv.grad, **out})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name].cpu(), value, rtol=2e-3, atol=1e-4, msg=name)
