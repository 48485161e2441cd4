"""A group of critics on a GPU, as launches and matmuls that plans record: what the node of `group.py` does there.

    forward     parameters and start of b, a = x Wx^T, b += z Wz^T, the moments
    backward    the moments' gradients, then those of x, z and the parameters by matmuls, of c by two launches

`forward` and `backward` are the steps; `run_forward` and `run_backward` replay them as directions of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cibr_kernels.dispatch import plans, triton_call
from cibr_kernels.numerics import ceil_div
from cibr_kernels.primitives.additive.moments.op import additive_moments_backward, additive_moments_forward

if TYPE_CHECKING:
    from cibr_kernels.information.critics import Weights
    from cibr_kernels.information.group import Group

BLOCKS = {"BLOCK_R": 64, "BLOCK_H": 64}
Needs = tuple[bool, bool, bool]


def serves(t: Tensor, backend: str) -> bool:
    """Whether a group of tensors like t goes this way."""
    if t.dtype != torch.float32 or backend == "reference" or (t.is_cpu and backend != "triton"):
        return False
    if torch.compiler.is_compiling():  # where nodes of Python are not taken either
        return False
    return triton_call.unsupported(t) is None


@dataclass(frozen=True)
class Wanted:
    """Which gradients: of each z, each x, and of each critic's Wx, Wz; of any c, w and bias."""

    zs: tuple[bool, ...]
    xs: tuple[bool, ...]
    wxs: tuple[bool, ...]
    wzs: tuple[bool, ...]
    c: bool
    w: bool
    bias: bool

    @property
    def needs(self) -> Needs:
        """Of a, b and w."""
        return any(self.xs) or any(self.wxs), any(self.zs) or any(self.wzs) or self.c, self.w


@dataclass
class Gradients:
    """Those that are wanted; c, w and bias for all critics: (critics, h), (critics, h), (critics,)."""

    zs: list[Tensor | None]
    xs: list[Tensor | None]
    wxs: list[Tensor | None]
    wzs: list[Tensor | None]
    c: Tensor | None = None
    w: Tensor | None = None
    bias: Tensor | None = None

    def flat(self) -> list[Tensor | None]:
        return [*self.zs, *self.xs, *self.wxs, *self.wzs, self.c, self.w, self.bias]


def forward(
    zs: Sequence[Tensor], xs: Sequence[Tensor], weights: Sequence[Weights], group: Group, needs: Needs
) -> tuple[Tensor, ...]:
    """x of each critic (n, dx), each z once (n, dz) -> J (critics,), L, a, b, w and the gradients of L."""
    critics, (n, h) = len(weights), (xs[0].shape[0], weights[0].c.shape[0])
    device = xs[0].device
    a, b = (torch.empty((critics, n, h), dtype=torch.float32, device=device) for _ in range(2))
    w, bias = (torch.empty(shape, dtype=torch.float32, device=device) for shape in ((critics, h), (critics,)))
    for k, own in enumerate(weights):
        triton_call.launch(
            _kernels().critic_parameters_kernel,
            (ceil_div(n, BLOCKS["BLOCK_R"]), ceil_div(h, BLOCKS["BLOCK_H"])),
            {"c": own.c, "w": own.w, "bias": own.bias, "b": b, "ws": w, "biases": bias, "n": n, "width": h, "first": k},
            BLOCKS,
        )
        torch.mm(xs[k], own.wx.t(), out=a[k])
        torch.addmm(b[k], zs[group.which[k]], own.wz.t(), out=b[k])
    inputs = [t[0] for t in (a, b, w, bias)] if group.alone else (a, b, w, bias)  # J and L are then 0-d
    j, el, *of_l = additive_moments_forward.function(
        *inputs, group.activation, group.slope, 0, group.include_diagonal, *needs, group.backend
    )
    return j, el, a, b, w, *of_l


def backward(
    g_j: Tensor | None,
    g_l: Tensor | None,
    zs: Sequence[Tensor],
    xs: Sequence[Tensor],
    weights: Sequence[Weights],
    made: Sequence[Tensor],
    group: Group,
    wanted: Wanted,
) -> Gradients:
    """g_j, g_l (critics,), None for 0; made: what `forward` gave from a on."""
    da, db, dw = additive_moments_backward.function(
        g_j, g_l, *made, group.activation, group.slope, 0, *wanted.needs, group.backend
    )
    critics = range(len(weights))
    found = Gradients(
        [_to_z(db, z, weights, group, i) if wanted.zs[i] else None for i, z in enumerate(zs)],
        [_product(da[k], weights[k].wx) if wanted.xs[k] else None for k in critics],
        [_product(da[k].t(), xs[k]) if wanted.wxs[k] else None for k in critics],
        [_product(db[k].t(), zs[group.which[k]]) if wanted.wzs[k] else None for k in critics],
        w=dw if wanted.w else None,
    )
    if wanted.c or wanted.bias:
        found.c, found.bias = _of_starts(g_j, g_l, db if wanted.c else made[1], group.alone)
    return found


def _product(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty((a.shape[0], b.shape[1]), dtype=torch.float32, device=a.device)
    return torch.mm(a, b, out=out)


def _to_z(db: Tensor, z: Tensor, weights: Sequence[Weights], group: Group, which: int) -> Tensor:
    """db (critics, n, h) -> the gradient of one z (n, dz), each critic's with its sign."""
    total = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    mine = [k for k in range(len(weights)) if group.which[k] == which]
    for nth, k in enumerate(mine):
        torch.addmm(total, db[k], weights[k].wz, beta=int(nth > 0), alpha=group.signs[k], out=total)
    return total


def _of_starts(g_j: Tensor | None, g_l: Tensor | None, db: Tensor, alone: bool) -> tuple[Tensor, Tensor]:
    """-> the gradients of c (critics, h), of a critic alone (h,), and bias (critics,)."""
    critics, n, h = db.shape
    blocks, blocks_h = ceil_div(n, BLOCKS["BLOCK_R"]), ceil_div(h, BLOCKS["BLOCK_H"])
    shapes = (critics, blocks, h), (h,) if alone else (critics, h), (critics,)
    partials, dc, dbias = (torch.empty(shape, dtype=torch.float32, device=db.device) for shape in shapes)
    given = next(g for g in (g_j, g_l) if g is not None)
    triton_call.launch(
        _kernels().critic_column_sums_kernel,
        (blocks, blocks_h, critics),
        {
            "db": db,
            "g_j": given if g_j is None else g_j,
            "g_l": given if g_l is None else g_l,
            "partials": partials,
            "dbias": dbias,
            "n": n,
            "width": h,
        },
        {"HAS_J": g_j is not None, "HAS_L": g_l is not None, **BLOCKS},
    )
    triton_call.launch(
        _sums().sums_reduce_kernel,
        (blocks_h, critics),
        {"partials": partials, "out": dc, "blocks": blocks, "width": h},
        {"BLOCK_R": 32, "BLOCK_H": BLOCKS["BLOCK_H"]},
    )
    return dc, dbias


# ---------------------------------------------------------------------------------------------- as directions of plans
class Task:
    """What the two directions of a node are told besides tensors; equal ones are one object, which is a plan's key."""

    def __init__(self, group: Group, needed: tuple[bool, ...], wanted: Wanted) -> None:
        self.group, self.needed, self.wanted = group, needed, wanted
        self.plain = group.alone and all(needed)  # a critic's gradients are the directions' outputs
        self.where = tuple(range(len(needed)))  # of tensors that are all different
        self.forward_key = (self, "critics forward", self.where)


def run_forward(task: Task, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """tensors: as the node has them, z, x and parameters -> what `forward` gives."""
    where, given = unique(tensors)
    group = task.group

    def direction(*here: Tensor) -> tuple[Tensor, ...]:
        return forward(*group.parts([here[i] for i in where]), group, task.wanted.needs)

    return plans.run((task, "critics forward", where), direction, given)


def run_backward(
    task: Task,
    plan: plans.Plan | None,
    g_j: Tensor | None,
    g_l: Tensor | None,
    tensors: Sequence[Tensor],
    made: Sequence[Tensor],
) -> list[Tensor | None]:
    """-> a gradient, or None, for each of the node's tensors.  made: what `forward` gave from a on; plan: that of the
    forward, if it is known."""
    upstream = [g if g.is_contiguous() else g.contiguous() for g in (g_j, g_l) if g is not None]
    has_j, has_l, start, kept = g_j is not None, g_l is not None, len(upstream), len(made)
    where, given = (task.where, tensors) if plan is not None else unique(tensors)
    group, wanted = task.group, task.wanted

    def direction(*here: Tensor) -> tuple[Tensor, ...]:
        gs = list(here[:start])
        of_j, of_l = gs[0] if has_j else None, gs[-1] if has_l else None
        inputs = [here[start + kept + i] for i in where]
        found = backward(of_j, of_l, *group.parts(inputs), here[start : start + kept], group, wanted)
        return tuple(t for t in found.flat() if t is not None)

    key = task, "critics backward", where, has_j, has_l
    found = plans.run_after(plan, key, direction, (*upstream, *made, *given), start)
    return list(found) if task.plain else in_order(found, task)


def in_order(flat: Sequence[Tensor], task: Task) -> list[Tensor | None]:
    """From the gradients that are wanted, as `Gradients.flat` has them, one or None for each of the node's tensors."""
    wanted, critics = task.wanted, len(task.group.which)
    given = iter(flat)
    single = [next(given) if flag else None for flag in (*wanted.zs, *wanted.xs, *wanted.wxs, *wanted.wzs)]
    c, w, bias = (next(given) if flag else None for flag in (wanted.c, wanted.w, wanted.bias))
    nothing, others = (None,) * critics, len(single) - 2 * critics
    grads: list[Tensor | None] = single[:others]
    of_c = nothing if c is None else c.view(critics, -1).unbind(0)
    of_w, of_bias = (nothing if t is None else t.split(1) for t in (w, bias))
    for each in zip(single[others : others + critics], single[others + critics :], of_c, of_w, of_bias, strict=True):
        grads += each
    return [g if need else None for g, need in zip(grads, task.needed, strict=True)]


def unique(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], list[Tensor]]:
    """Each tensor once, and where in that list each of `tensors` is: a plan's inputs share no memory."""
    places: dict[int, int] = {}
    where = tuple([places.setdefault(id(t), len(places)) for t in tensors])
    return where, list({id(t): t for t in tensors}.values())


def _kernels() -> ModuleType:
    from cibr_kernels.information import triton_group

    return triton_group


def _sums() -> ModuleType:
    from cibr_kernels.primitives import triton_sums

    return triton_sums
