"""The loss without options: its positives too are the kernels', in one call and one node of autograd.

The arithmetic is siglip_loss/op.py's, without its O(n d) tensors of positives, and at 64 rows in half the time.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cibr_kernels import checks
from cibr_kernels.dispatch import backends, library, plans
from cibr_kernels.numerics import promote, softplus
from cibr_kernels.primitives.dot.softplus.op import dot_softplus


def plain_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, share: float, backend: str) -> Tensor:
    """x (n, d), y (n, d), scale (), bias () -> (): share (the sum of softplus over all pairs, signed).

    backend: one that `backends.fused` gave.

    Only where `library.only_autograd_looks_on` says that nobody but autograd looks on, and the kernel takes x.
    """
    needs = x.requires_grad, y.requires_grad, scale.requires_grad, bias.requires_grad
    if any(needs) and torch.is_grad_enabled():
        if backend == "triton" and all(needs):
            checks.positive("logit_scale", scale)
            return _OnDevice.apply(x, y, scale, bias, share, None)  # type: ignore[no-any-return]
        return _loss_with_gradients(x, y, scale, bias, share, backend)
    return _fused(x, y, scale, bias, share, backend, (False,) * 4)[0]


def known_loss(x: Any, y: Any, scale: Any, bias: Any, mean: bool, backend: str) -> Tensor | None:
    """The loss of a call on a GPU whose launches were recorded, and whose arguments were checked, before; else None."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and isinstance(scale, Tensor) and isinstance(bias, Tensor)):
        return None
    wanted = x.requires_grad and y.requires_grad and scale.requires_grad and bias.requires_grad
    if not (wanted and x.is_cuda and x.dim() == 2 and torch.is_grad_enabled()):
        return None
    if torch.is_autocast_enabled("cuda") or backend not in ("auto", "triton"):
        return None
    share = 1 / x.shape[0] if mean else 1.0
    plan = _device_path().known(x, y, scale, bias, share)
    return None if plan is None else _OnDevice.apply(x, y, scale, bias, share, plan)  # type: ignore[no-any-return]


@lru_cache
def _device_path() -> ModuleType:
    """The backend of GPUs, imported where there is one."""
    return importlib.import_module("cibr_kernels.losses.siglip.triton")


class _OnDevice(torch.autograd.Function):
    """With all gradients.  plan: that of the forward, if it is known."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, share: float, plan: plans.Plan | None
    ) -> Tensor:
        ctx.share, ctx.plan = share, plans.origin(plan)
        if plan is None:
            forward = _device_path().forward_kept
            loss, *kept = backends.in_range("siglip_loss_forward", "triton", forward, x, y, scale, bias, share)
        else:
            loss, *kept = backends.in_range("siglip_loss_forward", "triton", plans.replay, plan, (x, y, scale, bias))
        ctx.save_for_backward(x, y, scale, bias, *kept)
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, bias, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            loss = general_loss(x, y, scale, bias, ctx.share, "triton")
            return *torch.autograd.grad(loss, (x, y, scale, bias), g, create_graph=True), None, None
        times = _device_path().times
        found = backends.in_range("siglip_loss_times", "triton", times, g, x, kept, ctx.plan)
        return *found, None, None


def general_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, share: float, backend: str) -> Tensor:
    """The same, made of operators."""
    positives = scale * (promote(x) * promote(y)).sum(1) + bias
    weights = torch.full_like(positives, share)
    return dot_softplus(x, y, scale, bias, weights, backend=backend) + share * softplus(-positives).sum()


def _fused(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, share: float, backend: str, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    checks.positive("logit_scale", scale)
    need_x, need_y, need_scale, need_bias, *_ = needs
    need_x = need_x or ((need_scale or need_bias) and not need_y)  # dscale comes from <x, dx> or <y, dy>
    return backends.run("siglip_loss", "forward", backend, (x,), x, y, scale, bias, share, need_x, need_y)


_loss_with_gradients = library.with_gradients("siglip_loss", _fused, general_loss)
