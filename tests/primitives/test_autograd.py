"""Gradients that are asked for and nothing else, the same in every run and on every number of threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from cases import LARGE, Recorded, leaves, towers
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels.information.dot_moments import dot_moments
from cibr_kernels.primitives.additive.moments.op import additive_moments
from cibr_kernels.primitives.additive.scores.op import additive_scores


def difference(moments: tuple[Tensor, Tensor]) -> Tensor:
    return moments[0] - 1.7 * moments[1]


# name: (function of its tensors, what makes them)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[[], list[Tensor]]]] = {
    "clip_loss": (lambda x, y, s: ck.clip_loss(x, y, s), lambda: [*towers(40, 40, 33), torch.tensor(9.0)]),
    "dot_moments": (lambda f, g: difference(dot_moments(f, g)), lambda: list(towers(40, 40, 33))),
    "additive_moments": (
        lambda a, b, w: difference(additive_moments(a, b, w)),
        lambda: [*towers(40, 40, 33, kind="raw"), torch.randn(33)],
    ),
    "additive_moments_smooth": (
        lambda a, b, w: difference(additive_moments(a, b, w, activation="silu")),
        lambda: [*towers(40, 40, 33, kind="raw"), torch.randn(33)],
    ),
    "clip_loss_groups": (
        lambda x, y, s: ck.clip_loss(x, y, s, group_ids=torch.arange(len(x)) % 30, label_smoothing=0.1),
        lambda: [*towers(40, 40, 33), torch.tensor(9.0)],
    ),
    "siglip_loss": (
        lambda x, y, s, b: ck.siglip_loss(x, y, s, b),
        lambda: [*towers(40, 40, 33), torch.tensor(9.0), torch.tensor(-3.0)],
    ),
    "siglip_loss_none": (
        lambda x, y, s, b: ck.siglip_loss(x, y, s, b, reduction="none").square().sum(),
        lambda: [*towers(40, 40, 33), torch.tensor(9.0), torch.tensor(-3.0)],
    ),
    "additive_scores": (
        lambda a, b, w: additive_scores(a, b, w).square().mean(),
        lambda: [*towers(40, 40, 33, kind="raw"), torch.randn(33)],
    ),
    "log_mean_exp": (lambda s: ck.log_mean_exp(s), lambda: [torch.randn(70, 31)]),
}
each_function = pytest.mark.parametrize("name", list(FUNCTIONS))


def gradients(f: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    inputs = leaves(*inputs)
    return list(torch.autograd.grad(f(*inputs), inputs))


def test_memory_is_poisoned_here():
    assert torch.empty(9).isnan().all()


@each_function
@pytest.mark.parametrize("budget", [0, LARGE])
def test_every_subset_of_gradients(name, budget):
    ck.set_stash_budget(budget)
    f, make = FUNCTIONS[name]
    inputs = make()
    every = gradients(f, inputs)
    for subset in itertools.product([False, True], repeat=len(inputs)):
        tensors = [t.detach().clone().requires_grad_(need) for t, need in zip(inputs, subset, strict=True)]
        value = f(*tensors)
        assert value.requires_grad == any(subset)
        if any(subset):
            value.backward()
        for t, need, grad in zip(tensors, subset, every, strict=True):
            if not need:
                assert t.grad is None
            elif t.dim() == 0:  # dscale from dy where dx is not asked for: another order of summation
                torch.testing.assert_close(t.grad, grad)
            else:
                assert torch.equal(t.grad, grad)


@pytest.mark.parametrize("subset", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_backward_is_asked_only_for_what_is_needed(subset):
    need_x, need_y, _ = subset
    x, y, s = (t.requires_grad_(need) for t, need in zip((*towers(8, 8, 4), torch.tensor(5.0)), subset, strict=True))
    with Recorded() as seen:
        ck.clip_loss(x, y, s).backward()
    ((_, (dx, dy, _)),) = seen.named("dot_lse_backward")
    assert bool(dy.numel()) == need_y
    assert bool(dx.numel()) == (need_x or not need_y)  # dscale needs one of them
    if need_x or need_y:
        f, g = towers(8, 8, 4)
        with Recorded() as seen:
            difference(dot_moments(f.requires_grad_(need_x), g.requires_grad_(need_y))).backward()
        ((_, (df, dg, _)),) = seen.named("dot_lse_backward")
        assert (bool(df.numel()), bool(dg.numel())) == (need_x, need_y)


@pytest.mark.parametrize("subset", list(itertools.product([False, True], repeat=3)), ids=str)
def test_additive_forward_computes_only_needed_gradients(subset):
    inputs = [t.requires_grad_(need) for t, need in zip((*towers(8, 8, 4), torch.randn(4)), subset, strict=True)]
    with Recorded() as seen:
        value = difference(additive_moments(*inputs))
        if any(subset):
            value.backward()
    ((_, outputs),) = seen.named("additive_moments_forward")
    assert tuple(bool(t.numel()) for t in outputs[2:]) == subset
    assert len(seen.named("additive_moments_backward")) == any(subset)


def test_no_gradient_work_without_gradients():
    x, y, s = leaves(*towers(40, 40, 33), torch.tensor(5.0))
    w = torch.randn(33, requires_grad=True)
    for needs_grad, inputs in ((False, (x, y, s, w)), (True, [t.detach() for t in (x, y, s, w)])):
        with torch.set_grad_enabled(needs_grad), Recorded() as seen:
            assert not ck.clip_loss(*inputs[:3]).requires_grad
            assert not additive_moments(inputs[0], inputs[1], inputs[3])[1].requires_grad
        ((_, outputs),) = seen.named("dot_lse_forward")
        assert outputs[-1].numel() == 0  # no exponentials kept
        ((_, outputs),) = seen.named("additive_moments_forward")
        assert not any(t.numel() for t in outputs[2:])


def test_kept_exponentials_stay_within_the_budget():
    x, y = leaves(*towers(64, 64, 8))
    for dtype, size in ((torch.float32, 4), (torch.float16, 4), (torch.bfloat16, 2)):
        for budget, kept in ((64 * 64 * size, True), (64 * 64 * size - 1, False)):
            ck.set_stash_budget(budget)
            with Recorded() as seen:
                ck.clip_loss(x.to(dtype), y.to(dtype), 5.0)
            ((_, outputs),) = seen.named("dot_lse_forward")
            stash = outputs[-1]
            assert stash.numel() * stash.element_size() == (64 * 64 * size if kept else 0)


@each_function
def test_runs_and_thread_counts_agree_to_the_bit(name):
    f, make = FUNCTIONS[name]
    inputs = [t.repeat(15, 1) + torch.randn(15 * t.shape[0], 1) if t.dim() == 2 else t for t in make()]
    results = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        tensors = leaves(*inputs)
        value = f(*tensors)
        results.append([value.detach(), *torch.autograd.grad(value, tensors)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@each_function
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_double_backward_raises(name, backend, monkeypatch):
    if backend == "reference":
        monkeypatch.setattr("cibr_kernels.dispatch.backends.NAMES", ("reference",))
    f, make = FUNCTIONS[name]
    inputs = leaves(*make())
    grads = torch.autograd.grad(f(*inputs), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives .* use backend='reference'"):
        sum(g.square().sum() for g in grads).backward()


@each_function
def test_strided_inputs_equal_contiguous_ones(name):
    f, make = FUNCTIONS[name]
    inputs = make()
    strided = [t.T.contiguous().T if t.dim() == 2 else t.repeat_interleave(2)[::2].view(t.shape) for t in inputs]
    rows = [torch.cat([t, t], 1)[:, : t.shape[1]] if t.dim() == 2 else t for t in inputs]
    assert not strided[0].is_contiguous() and not rows[0].is_contiguous()
    expected = [f(*inputs), *gradients(f, inputs)]
    for other in (strided, rows):
        tensors = [t.requires_grad_() for t in other]
        value = f(*tensors)
        for a, b in zip([value, *torch.autograd.grad(value, tensors)], expected, strict=True):
            assert torch.equal(a, b)


def test_expanded_gradient_and_broadcast_features():
    x = torch.randn(1, 8).expand(6, 8).requires_grad_()  # stride 0
    y = torch.randn(6, 8)
    torch.testing.assert_close(ck.clip_loss(x, y, 3.0), ck.clip_loss(x.detach().clone(), y, 3.0))


@each_function
@pytest.mark.parametrize("budget", [0, LARGE])
def test_backward_twice_on_a_retained_graph(name, budget):
    ck.set_stash_budget(budget)
    f, make = FUNCTIONS[name]
    inputs = leaves(*make())
    value = f(*inputs)
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    second = torch.autograd.grad(value, inputs, grad_outputs=torch.tensor(2.0))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)
