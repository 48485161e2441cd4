"""J and L of several concat critics of one shape, over all pairs, as one node of autograd.

    a_k = x_k Wx_k^T        b_k = z_k Wz_k^T + c_k        (J, L)_k by `additive_moments` of the group

Each critic alone takes a dozen nodes and as many launches as the group; small batches are the host's time.  In a game
of encoders against critics z's gradient is not the parameters': `signs` multiply it on its way to z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cibr_kernels.dispatch import library
from cibr_kernels.information.critics import View
from cibr_kernels.primitives.additive.moments.op import (
    additive_moments,
    additive_moments_backward,
    additive_moments_forward,
)

MOST = 1 << 22  # numbers of a on a GPU, (8192, 512): past them launches are nothing, and four workspaces are much


class Weights(NamedTuple):
    """The parameters of a concat critic: a = x Wx^T, b = z Wz^T + c, S = bias + w . phi(a + b)."""

    wx: Tensor  # (h, dx)
    wz: Tensor  # (h, dz)
    c: Tensor  # (h,)
    w: Tensor  # (1, h)
    bias: Tensor  # (1,)


@dataclass(frozen=True)
class Group:
    """What the node is told besides tensors."""

    which: tuple[int, ...]  # the z of each critic
    signs: tuple[float, ...]  # on the way to z
    activation: str
    slope: float
    include_diagonal: bool
    backend: str


def weights_of_all(critics: Sequence[View], *tensors: Tensor) -> list[Weights] | None:
    """The parameters of critics that make a group; None where one of them has to be called, or somebody looks on.

    A critic says by `plain_weights` that its parameters are all there is to it.
    """
    if not library.only_autograd_looks_on(*tensors):
        return None
    first, found = critics[0].inner, []
    for critic in critics:
        inner = critic.inner
        known = critic.form == "additive_parts" and critic.called is inner and hasattr(inner, "plain_weights")
        weights = inner.plain_weights() if known else None
        if weights is None or (inner.activation, inner.slope) != (first.activation, first.slope):
            return None
        found.append(Weights(*weights))
    shape, dtype = found[0].c.shape, tensors[0].dtype
    if not tensors[0].is_cpu and tensors[0].shape[0] * shape[0] > MOST:
        return None
    alike = all(w.c.shape == shape and w.c.dtype == dtype for w in found)
    return found if alike and all(t.dtype == dtype for t in tensors) else None


def grouped_moments(
    xs: Sequence[Tensor], zs: Sequence[Tensor], weights: Sequence[Weights], group: Group
) -> tuple[Tensor, Tensor]:
    """x of each critic (n, dx), data; each z once (n, dz) -> J (critics,), L (critics,), NaN for what is not finite."""
    return _Moments.apply(group, len(zs), *zs, *xs, *(p for w in weights for p in w))  # type: ignore[no-any-return]


class ScaledGradient(torch.autograd.Function):
    """z, whose gradient is multiplied by `factor`: no arithmetic forward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, factor: Tensor | float) -> Tensor:
        ctx.factor = factor
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.factor, None


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, count: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        critics = len(group.which)
        zs, xs = tensors[:count], tensors[count : count + critics]
        weights = [Weights(*tensors[i : i + 5]) for i in range(count + critics, len(tensors), 5)]
        n, h = xs[0].shape[0], weights[0].c.shape[0]
        a, b = (xs[0].new_empty(critics, n, h) for _ in range(2))
        for k, own in enumerate(weights):
            torch.mm(xs[k], own.wx.t(), out=a[k])
            torch.addmm(own.c, zs[group.which[k]], own.wz.t(), out=b[k])
        w, bias = torch.cat([own.w for own in weights]), torch.cat([own.bias for own in weights])
        ctx.group, ctx.count = group, count
        ctx.needs = needs = _needs(ctx.needs_input_grad, count, critics)
        j, el, *of_l = additive_moments_forward.function(
            a, b, w, bias, group.activation, group.slope, 0, group.include_diagonal, *needs, group.backend
        )
        ctx.save_for_backward(*tensors, a, b, w, *of_l)
        ctx.set_materialize_grads(False)
        return j, el

    @staticmethod
    def backward(ctx: Any, g_j: Tensor | None, g_l: Tensor | None) -> tuple[Tensor | None, ...]:
        group, count, needed = ctx.group, ctx.count, ctx.needs_input_grad[2:]
        critics, saved = len(group.which), ctx.saved_tensors
        inputs, made = saved[:-6], saved[-6:]
        zs, xs = inputs[:count], inputs[count : count + critics]
        wzs = inputs[count + critics + 1 :: 5]
        if torch.is_grad_enabled():
            return None, None, *_differentiable(inputs, group, count, needed, (g_j, g_l))
        da, db, dw = additive_moments_backward(
            g_j, g_l, *made, group.activation, group.slope, 0, *ctx.needs, group.backend
        )
        given = [g for g in (g_j, g_l) if g is not None]
        dbias = given[0] if len(given) == 1 else given[0] + given[1]
        dzs = [_to_z(db, wzs, group, i) if needed[i] else None for i in range(count)]
        dc = db.sum(1) if db.numel() else db
        grads: list[Tensor | None] = [None, None, *dzs, *(None,) * critics]
        for k in range(critics):
            need_wx, need_wz, need_c, need_w, need_bias = needed[count + critics + 5 * k :][:5]
            grads += [
                da[k].t() @ xs[k] if need_wx else None,
                db[k].t() @ zs[group.which[k]] if need_wz else None,
                dc[k] if need_c else None,
                dw[k : k + 1] if need_w else None,
                dbias[k : k + 1] if need_bias else None,
            ]
        return tuple(grads)


def _composed(tensors: Sequence[Tensor], group: Group, count: int) -> tuple[Tensor, Tensor]:
    """The node's J and L made of operators."""
    critics = len(group.which)
    zs, xs = tensors[:count], tensors[count : count + critics]
    weights = [Weights(*tensors[i : i + 5]) for i in range(count + critics, len(tensors), 5)]
    signed = [ScaledGradient.apply(zs[z], sign) for z, sign in zip(group.which, group.signs, strict=True)]
    return additive_moments(
        torch.stack([F.linear(x, own.wx) for x, own in zip(xs, weights, strict=True)]),
        torch.stack([F.linear(z, own.wz, own.c) for z, own in zip(signed, weights, strict=True)]),
        torch.cat([own.w for own in weights]),
        torch.cat([own.bias for own in weights]),
        activation=group.activation,
        slope=group.slope,
        include_diagonal=group.include_diagonal,
        backend=group.backend,
    )


def _differentiable(
    tensors: Sequence[Tensor], group: Group, count: int, needed: Sequence[bool], upstream: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients for a backward with create_graph: operators refuse a second derivative, the node would forget."""
    wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
    with torch.enable_grad():
        outputs = [t for t, g in zip(_composed(tensors, group, count), upstream, strict=True) if g is not None]
    given = [g for g in upstream if g is not None]
    made = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True))
    return [next(made) if need else None for need in needed]


def _needs(needed: tuple[bool, ...], count: int, critics: int) -> tuple[bool, bool, bool]:
    """Whether the gradients of any a, b and w are asked for."""
    of_z, of_critics = needed[2 : 2 + count], needed[2 + count + critics :]
    return any(of_critics[0::5]), any(of_z) or any(of_critics[1::5]) or any(of_critics[2::5]), any(of_critics[3::5])


def _to_z(db: Tensor, wzs: Sequence[Tensor], group: Group, z: int) -> Tensor:
    """db (critics, n, h) -> the gradient of one z (n, dz)."""
    mine = sorted((k for k in range(len(wzs)) if group.which[k] == z), key=lambda k: -group.signs[k])
    total = db[mine[0]] @ wzs[mine[0]]
    total = total if group.signs[mine[0]] == 1 else total * group.signs[mine[0]]
    for k in mine[1:]:
        total.addmm_(db[k], wzs[k], alpha=group.signs[k])
    return total
