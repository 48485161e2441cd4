"""J and L of several concat critics of one shape, over all pairs, as one node of autograd.

    a_k = x_k Wx_k^T        b_k = z_k Wz_k^T + c_k        (J, L)_k by `additive_moments` of the group

On a GPU each direction of the node is a plan (`group_device.py`), of a critic alone too.  Each critic alone takes a
dozen nodes and as many launches as the group; small batches are the host's time.  In a game of encoders against critics
z's gradient is not the parameters': `signs` multiply it on its way to z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cibr_kernels.dispatch import backends, library, plans
from cibr_kernels.information import group_device
from cibr_kernels.information.critics import View, Weights
from cibr_kernels.information.group_device import Gradients, Task, Wanted
from cibr_kernels.primitives.additive.moments.op import (
    additive_moments,
    additive_moments_backward,
    additive_moments_forward,
)

MOST = 1 << 22  # numbers of a on a GPU, (8192, 512): past them launches are nothing, and four workspaces are much


@dataclass(frozen=True)
class Group:
    """What the node is told besides tensors."""

    which: tuple[int, ...]  # the z of each critic
    signs: tuple[float, ...]  # on the way to z
    activation: str
    slope: float
    include_diagonal: bool
    backend: str
    alone: bool = False  # one critic, whose J and L are 0-d

    def parts(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], list[Weights]]:
        """Of what the node is given: zs, the x of each critic, parameters."""
        critics = len(self.which)
        count = len(tensors) - 6 * critics
        weights = [Weights(*tensors[i : i + 5]) for i in range(count + critics, len(tensors), 5)]
        return tensors[:count], tensors[count : count + critics], weights


def weights_of_all(critics: Sequence[View], *tensors: Tensor) -> list[Weights] | None:
    """The parameters of critics that make a group; None where one of them has to be called, or somebody looks on."""
    if not library.only_autograd_looks_on(*tensors):
        return None
    first, found = critics[0].inner, []
    for critic in critics:
        weights, inner = critic.weights, critic.inner
        if weights is None or (inner.activation, inner.slope) != (first.activation, first.slope):
            return None
        found.append(weights)
    shape, dtype = found[0].c.shape, tensors[0].dtype
    if not tensors[0].is_cpu and len(critics) > 1 and tensors[0].shape[0] * shape[0] > MOST:
        return None
    alike = all(w.c.shape == shape and w.c.dtype == dtype for w in found)
    return found if alike and all(t.dtype == dtype for t in tensors) else None


def grouped_moments(
    xs: Sequence[Tensor], zs: Sequence[Tensor], weights: Sequence[Weights], group: Group
) -> tuple[Tensor, Tensor]:
    """x of each critic (n, dx); each z once (n, dz) -> J (critics,), L (critics,), NaN for what is not finite."""
    return _Moments.apply(group, None, *zs, *xs, *(p for w in weights for p in w))  # type: ignore[no-any-return]


def known_moments(x: Any, z: Any, critic: Any, include_diagonal: bool, backend: str) -> tuple[Tensor, Tensor] | None:
    """(J, L) of a critic alone on a GPU whose arguments were checked, and launches recorded, before; else None."""
    plain = getattr(critic, "plain_weights", None)
    if plain is None or x is z or not (isinstance(x, Tensor) and isinstance(z, Tensor) and x.is_cuda):
        return None
    weights = plain()
    if weights is None or not torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return None
    tensors = z, x, *weights
    needed = tuple([t.requires_grad for t in tensors])
    if not (any(needed) and library.only_autograd_looks_on(*tensors)):
        return None
    group = _alone(critic.activation, critic.slope, include_diagonal, backend)
    plan = plans.find(task_of(group, needed, backends.NAMES).forward_key, tensors)
    return None if plan is None else _Moments.apply(group, plan, *tensors)


@lru_cache
def _alone(activation: str, slope: float, include_diagonal: bool, backend: str) -> Group:
    return Group((0,), (1.0,), activation, slope, include_diagonal, backend, alone=True)


@lru_cache
def task_of(group: Group, needed: tuple[bool, ...], names: tuple[str, ...]) -> Task:
    """needed: of each tensor of the node, whether its gradient is; names: of the backends that may be chosen."""
    return Task(group, needed, wanted_of(needed, group))


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
    def forward(ctx: Any, group: Group, plan: plans.Plan | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.task = task = task_of(group, ctx.needs_input_grad[2:], backends.NAMES)
        ctx.on_device = plan is not None or group_device.serves(tensors[0], group.backend)
        ctx.plan = plans.origin(plan)
        if plan is not None:
            j, el, *made = backends.in_range("additive_moments_forward", "plan", plans.replay, plan, tensors)
        else:
            j, el, *made = (group_device.run_forward if ctx.on_device else _forward)(task, tensors)
        ctx.save_for_backward(*tensors, *made)
        ctx.set_materialize_grads(False)
        return j, el

    @staticmethod
    def backward(ctx: Any, g_j: Tensor | None, g_l: Tensor | None) -> tuple[Tensor | None, ...]:
        task, saved = ctx.task, ctx.saved_tensors
        tensors, made = saved[:-6], saved[-6:]
        if torch.is_grad_enabled():
            return None, None, *_differentiable(tensors, task.group, task.needed, (g_j, g_l))
        run = group_device.run_backward if ctx.on_device else _backward
        return None, None, *run(task, ctx.plan, g_j, g_l, tensors, made)


def wanted_of(needed: Sequence[bool], group: Group) -> Wanted:
    """From the node's needs_input_grad of zs, xs and parameters."""
    critics = len(group.which)
    count = len(needed) - 6 * critics
    of_parameters = needed[count + critics :]
    c, w, bias = (any(of_parameters[i::5]) for i in (2, 3, 4))
    return Wanted(
        tuple(needed[:count]),
        tuple(needed[count : count + critics]),
        tuple(of_parameters[0::5]),
        tuple(of_parameters[1::5]),
        c,
        w,
        bias,
    )


def _forward(task: Task, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """-> J, L, a, b, w and the gradients of L."""
    group, needs = task.group, task.wanted.needs
    zs, xs, weights = group.parts(tensors)
    n, h = xs[0].shape[0], weights[0].c.shape[0]
    a, b = (xs[0].new_empty(len(weights), n, h) for _ in range(2))
    for k, own in enumerate(weights):
        torch.mm(xs[k], own.wx.t(), out=a[k])
        torch.addmm(own.c, zs[group.which[k]], own.wz.t(), out=b[k])
    w, bias = torch.cat([own.w for own in weights]), torch.cat([own.bias for own in weights])
    j, el, *of_l = additive_moments_forward.function(
        a, b, w, bias, group.activation, group.slope, 0, group.include_diagonal, *needs, group.backend
    )
    return j, el, a, b, w, *of_l


def _backward(
    task: Task, plan: None, g_j: Tensor | None, g_l: Tensor | None, tensors: Sequence[Tensor], made: Sequence[Tensor]
) -> list[Tensor | None]:
    group, wanted = task.group, task.wanted
    zs, xs, weights = group.parts(tensors)
    da, db, dw = additive_moments_backward(
        g_j, g_l, *made, group.activation, group.slope, 0, *wanted.needs, group.backend
    )
    given = [g for g in (g_j, g_l) if g is not None]
    critics = range(len(weights))
    wzs = [own.wz for own in weights]
    found = Gradients(
        [_to_z(db, wzs, group, i) if need else None for i, need in enumerate(wanted.zs)],
        [da[k] @ weights[k].wx if wanted.xs[k] else None for k in critics],
        [da[k].t() @ xs[k] if wanted.wxs[k] else None for k in critics],
        [db[k].t() @ zs[group.which[k]] if wanted.wzs[k] else None for k in critics],
        db.sum(1) if wanted.c else None,
        dw if wanted.w else None,
        (given[0] if len(given) == 1 else given[0] + given[1]) if wanted.bias else None,
    )
    return group_device.in_order([t for t in found.flat() if t is not None], task)


def composed(tensors: Sequence[Tensor], group: Group) -> tuple[Tensor, Tensor]:
    """The node's J and L made of operators."""
    zs, xs, weights = group.parts(tensors)
    signed = [ScaledGradient.apply(zs[z], sign) for z, sign in zip(group.which, group.signs, strict=True)]
    j, el = additive_moments(
        torch.stack([F.linear(x, own.wx) for x, own in zip(xs, weights, strict=True)]),
        torch.stack([F.linear(z, own.wz, own.c) for z, own in zip(signed, weights, strict=True)]),
        torch.cat([own.w for own in weights]),
        torch.cat([own.bias for own in weights]),
        activation=group.activation,
        slope=group.slope,
        include_diagonal=group.include_diagonal,
        backend=group.backend,
    )
    return (j.squeeze(0), el.squeeze(0)) if group.alone else (j, el)


def _differentiable(
    tensors: Sequence[Tensor], group: Group, needed: Sequence[bool], upstream: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients for a backward with create_graph: operators refuse a second derivative, the node would forget."""
    wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
    with torch.enable_grad():
        outputs = [t for t, g in zip(composed(tensors, group), upstream, strict=True) if g is not None]
    given = [g for g in upstream if g is not None]
    made = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True))
    return [next(made) if need else None for need in needed]


def _to_z(db: Tensor, wzs: Sequence[Tensor], group: Group, z: int) -> Tensor:
    """db (critics, n, h) -> the gradient of one z (n, dz)."""
    mine = sorted((k for k in range(len(wzs)) if group.which[k] == z), key=lambda k: -group.signs[k])
    total = db[mine[0]] @ wzs[mine[0]]
    total = total if group.signs[mine[0]] == 1 else total * group.signs[mine[0]]
    for k in mine[1:]:
        total.addmm_(db[k], wzs[k], alpha=group.signs[k])
    return total
