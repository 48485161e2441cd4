"""The loss without options: at 64 rows the nodes of autograd and the small operators of the general path would take
longer than the matmuls.  The arithmetic is clip_loss/op.py's:

    loss = 1/kn sum_w sum_i softplus(t_wi)      t_wi = R_i - p_i, and C_i - p_i unless one_way (k = 2)
    dR, dC = sigmoid(t) / kn                    dp = -sum_w of it

One node of autograd; and on the CPU one call of C++ for a loss without gradients, or for one whose logits are small,
which makes the gradients with it.  (Without a backward they are made for nothing, but at this size that costs less than
coming back.)  On a GPU, but for float16, these ends are one launch; upstream's g is multiplied in at the end.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cibr_kernels import checks
from cibr_kernels.dispatch import backends, library, plans
from cibr_kernels.primitives.dot.lse.op import (
    dot_lse,
    dot_lse_backward,
    dot_lse_forward,
    stash_budget,
    stash_budget_on,
)

FUSED_BACKWARD_BYTES = 1 << 22  # bytes of float32 logits up to which gradients are made with the loss: n = 1024


def plain_loss(x: Tensor, y: Tensor, scale: Tensor, one_way: bool, backend: str) -> Tensor:
    """x (n, d), y (n, d), scale () -> ().  Only where `library.only_autograd_looks_on`."""
    fused = backends.fused("clip_loss", backend, x)  # y has its dtype and device
    native = fused == "native"
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or scale.requires_grad):
        small = 4 * x.shape[0] ** 2 <= min(FUSED_BACKWARD_BYTES, stash_budget())
        if fused == "triton":
            return _OnDevice.apply(x, y, scale, one_way, backend, None)
        return (_with_gradients if native and small else _Plain.apply)(x, y, scale, one_way, backend)
    if native:
        return _loss_and_gradients(x, y, scale, one_way, backend, None)[0]
    if fused == "triton":
        return backends.run("clip_loss", "forward", "triton", (x,), x, y, scale, one_way, 0, False)[0]
    return _mean_softplus(_margins(*_sums(x, y, scale, one_way, 0, backend)[:3]))


def known_loss(x: Tensor, y: Any, scale: Any, one_way: bool, backend: str) -> Tensor | None:
    """The loss of a call whose launches were recorded, and whose arguments were checked, before; else None.
    x: on a GPU."""
    if not (isinstance(y, Tensor) and isinstance(scale, Tensor)):
        return None
    wanted = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or scale.requires_grad)
    if not wanted or torch.is_autocast_enabled("cuda") or backend not in ("auto", "triton"):
        return None
    plan = device_path().known(x, y, scale, one_way, stash_budget_on(x.device))
    return None if plan is None else _OnDevice.apply(x, y, scale, one_way, backend, plan)


@lru_cache
def device_path() -> ModuleType:
    """The backend of GPUs, imported where there is one."""
    return importlib.import_module("cibr_kernels.losses.clip.triton")


@lru_cache
def _native_path() -> ModuleType:
    """The backend of CPUs, imported where it was built."""
    return importlib.import_module("cibr_kernels.losses.clip.native")


def _general(x: Tensor, y: Tensor, scale: Tensor, one_way: bool, backend: str) -> Tensor:
    """The same made of operators, for a backward with create_graph: they refuse a second derivative in words."""
    rows, cols, positives = dot_lse(x, y, scale, need_cols=not one_way, backend=backend)
    return _mean_softplus(_margins(rows, cols, positives))


def _sums(x: Tensor, y: Tensor, scale: Tensor, one_way: bool, budget: int, backend: str) -> tuple[Tensor, ...]:
    return dot_lse_forward.function(x, y, scale, None, None, None, 0, True, not one_way, False, budget, backend)


def _margins(rows: Tensor, cols: Tensor, positives: Tensor) -> Tensor:
    """-> t (k, n)."""
    return torch.stack((rows, cols) if cols.numel() else (rows,)).sub_(positives)


def _mean_softplus(margins: Tensor) -> Tensor:
    return F.softplus(margins, threshold=40).mean()  # past 40, softplus(t) is t to the last digit of float64


class _OnDevice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, one_way: bool, backend: str, plan: plans.Plan | None
    ) -> Tensor:
        ctx.one_way, ctx.backend, ctx.plan = one_way, backend, plans.origin(plan)
        if plan is None:
            budget = stash_budget_on(x.device)
            loss, *kept = backends.run("clip_loss", "forward", "triton", (x,), x, y, scale, one_way, budget)
        else:
            loss, *kept = backends.in_range("clip_loss_forward", "triton", plans.replay, plan, (x, y, scale))
        ctx.save_for_backward(x, y, scale, *kept)
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, *kept = ctx.saved_tensors
        need_x, need_y, need_scale, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            needed = [t for t, need in zip((x, y, scale), (need_x, need_y, need_scale), strict=True) if need]
            loss = _general(x, y, scale, ctx.one_way, ctx.backend)
            made = iter(torch.autograd.grad(loss, needed, g, create_graph=True))
            return *(next(made) if need else None for need in (need_x, need_y, need_scale)), None, None, None
        needs = need_x or not need_y, need_y  # dscale comes from <x, dx> or <y, dy>: one of the two is computed for it
        dx, dy, dscale = backends.in_range(
            "clip_loss_backward", "triton", device_path().backward, g, x, y, scale, kept, ctx.one_way, *needs, ctx.plan
        )
        return dx if need_x else None, dy if need_y else None, dscale if need_scale else None, None, None, None


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, one_way: bool, backend: str) -> Tensor:
        rows, cols, positives, _, _, *stash = _sums(x, y, scale, one_way, stash_budget_on(x.device), backend)
        ctx.save_for_backward(x, y, scale, rows, cols, positives, *stash)
        ctx.backend = backend
        return _mean_softplus(_margins(rows, cols, positives))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, rows, cols, positives, *stash = ctx.saved_tensors
        need_x, need_y, need_scale, *_ = ctx.needs_input_grad
        needs = need_x or not need_y, need_y
        margins = _margins(rows, cols, positives)
        slopes = torch.sigmoid(margins) * (g / margins.numel())
        g_rows, g_cols = slopes.unbind(0) if cols.numel() else (slopes[0], cols)
        dx, dy, dscale = dot_lse_backward(
            g_rows,
            g_cols,
            slopes.sum(0).neg_(),
            x,
            y,
            scale,
            None,
            None,
            None,
            rows,
            cols,
            positives,
            *stash,
            0,
            True,
            *needs,
            ctx.backend,
        )
        return dx if need_x else None, dy if need_y else None, dscale if need_scale else None, None, None


def _loss_and_gradients(
    x: Tensor, y: Tensor, scale: Tensor, one_way: bool, backend: str, needs: tuple[bool, ...] | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """-> the loss and, unless `needs` is None, its gradients; one of dx, dy at least, because dscale comes from it."""
    need_y = needs is not None and needs[1]
    need_x = needs is not None and (needs[0] or not need_y)
    checks.positive("logit_scale", scale)
    forward = _native_path().forward  # which can run it, or `plain_loss` would not have come here
    return backends.in_range("clip_loss_forward", "native", forward, x, y, scale, one_way, need_x, need_y)


_with_gradients = library.with_gradients("clip_loss", _loss_and_gradients, _Plain.apply)
