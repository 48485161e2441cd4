"""The plain clip_loss in Triton: dot_lse's launches, and the O(n) ends in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import plans, triton_call
from cibr_kernels.dispatch.plan import Plan
from cibr_kernels.primitives.dot.lse import triton as dot_lse
from cibr_kernels.primitives.dot.lse.triton_configs import blocks, tf32_allowed
from cibr_kernels.primitives.dot.problem import LseProblem
from cibr_kernels.primitives.dot.triton_parts import pitch, total

FOLDED = (  # what clip_loss_ends_kernel takes of the arguments of dot_lse_fold_kernel
    "mode",
    "shift_log2",
    "part_row_max",
    "part_row_sum",
    "part_col_max",
    "part_col_sum",
    "row_max",
    "col_max",
    "positives",
    "n",
    "panel",
    "strips",
    "col_tiles",
)


def unsupported(*tensors: Tensor) -> str | None:
    """float16 needs a power of two found among the weights before they are made."""
    if tensors[0].dtype == torch.float16:
        return "the kernels of this loss's ends are for bfloat16 and float32"
    return triton_call.unsupported(*tensors)


def forward(
    x: Tensor, y: Tensor, scale: Tensor, one_way: bool, budget: int, gradient: bool = True
) -> tuple[Tensor, ...]:
    """-> the loss () and, where a gradient is wanted, what `backward` reads."""

    def direction(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return launch_forward(x, y, scale, one_way, budget, gradient)

    return plans.run(_key("clip_loss forward", x, one_way, budget, gradient), direction, (x, y, scale))


def known(x: Tensor, y: Tensor, scale: Tensor, one_way: bool, budget: int) -> Plan | None:
    """The plan of `forward`, where such a call was made before: then these tensors need no check."""
    return plans.find(_key("clip_loss forward", x, one_way, budget, True), (x, y, scale))


def backward(
    g: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    kept: tuple[Tensor, ...],
    one_way: bool,
    need_dx: bool,
    need_dy: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx (n, d), dy (n, d), each empty unless needed, dscale ().  plan: that of the forward, if it is known."""

    def direction(g: Tensor, x: Tensor, y: Tensor, scale: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        return launch_backward(g, x, y, scale, kept, one_way, need_dx, need_dy)

    key = _key("clip_loss backward", x, one_way, need_dx, need_dy)
    dx, dy, dscale = plans.run_after(plan, key, direction, (g, x, y, scale, *kept), 1)
    return dx, dy, dscale


def _key(name: str, x: Tensor, *options: int) -> tuple[object, ...]:
    return name, *options, x.dtype == torch.float32 and tf32_allowed()


def launch_forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    one_way: bool,
    budget: int,
    gradient: bool,
    panels: dot_lse.Panels = dot_lse.PANELS,
) -> tuple[Tensor, ...]:
    """`forward` without a plan."""
    from cibr_kernels.losses.clip import triton_kernels as kernels

    n, programs = x.shape[0], blocks(x.shape[0], dot_lse.BLOCK_F)
    stash = dot_lse.room_for_stash(x, y, budget)
    losses = scale.new_empty(programs)
    room = scale.new_empty(5 * pitch(n) + 32 if gradient else 0)
    names = ("u", "v", "rows2", "cols2", "exponent", "stash_shift", "g_positives")
    kept: dict[str, Any] = dict.fromkeys(names)
    if gradient:
        weights, g_positives = _weights(room, n, one_way)
        kept = {name: getattr(weights, name, g_positives) for name in names}

    def ends(folded: dict[str, Any], fold: bool) -> None:
        """The loss, and what a backward reads, from the fold's arguments; fold: after folding the last panel."""
        triton_call.launch(
            kernels.clip_loss_ends_kernel,
            (programs,),
            {
                **{name: folded[name] for name in FOLDED},
                "rows": folded["row_sum"],
                "cols": folded["col_sum"],
                **kept,
                "losses": losses,
                "share": 1 / (n if one_way else 2 * n),
            },
            {
                "FOLD": fold,
                "COLS": not one_way,
                "GRADIENT": gradient,
                "BLOCK_T": dot_lse.BLOCK_T,
                "BLOCK_L": dot_lse.BLOCK_F,
            },
        )

    dot_lse.forward(LseProblem(x, y, scale, None, None, 0, True), not one_way, False, stash, ends, panels)
    loss = total(losses)
    if not gradient:
        return (loss,)
    return (loss, room, stash) if stash.numel() else (loss, room)


def launch_backward(
    g: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    kept: Sequence[Tensor],
    one_way: bool,
    need_dx: bool,
    need_dy: bool,
    panels: dot_lse.Panels = dot_lse.PANELS,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` without a plan."""
    room, *stash = kept
    weights, g_positives = _weights(room, x.shape[0], one_way)
    exponentials = stash[0] if stash else x.new_empty(0)
    problem = LseProblem(x, y, scale, None, None, 0, True)
    return dot_lse.weighted(problem, weights, g_positives, exponentials, need_dx, need_dy, g, panels)


def _weights(room: Tensor, n: int, one_way: bool) -> tuple[dot_lse.Weights, Tensor]:
    """The weights of P and g_positives (n,) in one block of memory."""
    step, none = pitch(n), room[:0]
    u, v, rows2, cols2, g_positives = (room[k * step : k * step + n] for k in range(5))
    exponent, shift = room[5 * step], room[5 * step + 16]
    return dot_lse.Weights(u, none if one_way else v, rows2, none if one_way else cols2, exponent, shift), g_positives
