"""Row and column log-sum-exp of all-pairs dot products: what every loss of the dot family is an O(n) function of.

    l_ij = scale <x_i, y_j>        positives_i = l_i,first_positive+i
    rows_i = log sum_j exp l_ij    cols_j = log sum_i exp l_ij, both without the positives when they are masked, and
                                   without pairs of one group where rows and columns have ids
    G_ij = exp(l_ij - rows_i) g_rows_i + exp(l_ij - cols_j) g_cols_j,  and g_positives_i at the positives, in float32
    dx = scale G y    dy = scale G^T x    dscale = sum_ij G_ij <x_i, y_j> = sum_i <x_i, dx_i> / scale

The n x m logits are never stored in full.  Where exp(l) fits `stash_budget()` it is kept for the backward (1 + 2 matmul
passes), otherwise the backward computes the logits again (1 + 3) and memory is O((n + m) d).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cibr_kernels import checks
from cibr_kernels.dispatch import backends, library, native_call
from cibr_kernels.dispatch.library import operator, or_zeros
from cibr_kernels.primitives.dot.problem import LseGradients, LseProblem, LseSums

SERVES = "clip_loss, or an estimate with a separable critic"

DEFAULT_STASH = 64 * 2**20
_stash_bytes: int | None = None  # None: nobody set it


def stash_budget() -> int:
    """Bytes that a loss of the dot family may spend on keeping exp(logits) for the backward.  Default: 64 MiB.

    The default is that of the CPU.  On a GPU nothing is kept unless a budget was set: there the logits cost less than
    the memory.
    """
    return DEFAULT_STASH if _stash_bytes is None else _stash_bytes


def stash_budget_on(device: torch.device) -> int:
    """The budget of a loss whose features are on `device`."""
    return 0 if _stash_bytes is None and device.type != "cpu" else stash_budget()


def set_stash_budget(size: int | None) -> None:
    """Sets the budget of the stash tier in bytes, on every device; 0 turns it off, None gives back the default.

    On the CPU n rows and m columns take n * m * 4 bytes for float32 and float16 features, n * m * 2 for bfloat16.
    Scratch memory of that size, up to 1 GiB, then stays with the process, unless its limit was set otherwise.
    """
    global _stash_bytes
    if size is not None and size < 0:
        raise ValueError(f"the stash budget must not be negative, got {size}")
    if backends.native_available():
        module = backends.compiled()
        if module.scratch_limit() == _scratch_limit(stash_budget()):
            module.set_scratch_limit(_scratch_limit(DEFAULT_STASH if size is None else size))
    _stash_bytes = size


def _scratch_limit(budget: int) -> int:
    """Bytes that the CPU kernels keep: fresh pages of a large stash would cost several percent of a step."""
    return max(128 * 2**20, min(budget, 2**30))


def dot_lse(
    x: Tensor,  # (n, d)
    y: Tensor,  # (m, d)
    scale: Tensor,  # ()
    *,
    row_ids: Tensor | None = None,  # (n,) int64
    col_ids: Tensor | None = None,  # (m,) int64
    first_positive: int = 0,
    mask_positives: bool = True,
    row_limits: Tensor | None = None,  # (n,) in the dtype of the sums
    need_cols: bool = True,
    need_max: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """-> rows (n,), cols (m,) ((0,) unless needed), positives (n,), float32, differentiable in all three.  No checks.

    Row i's positive is column first_positive + i < m.  The log of an empty sum is -inf and has no gradient.
    Pairs with row_ids_i = col_ids_j take no part in the sums either, whether positives or not; nor do, in sums of rows
    without those of columns, pairs with l_ij > row_limits_i, through which no gradient flows into the limits.
    need_max: two more, the largest l_ij of each sum, (n,) and (m,) ((0,) unless cols are needed), without gradient.
    """
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or scale.requires_grad)
    budget = stash_budget_on(x.device) if needs_grad and not library.is_exporting() else 0
    x, y = x.contiguous(), y.contiguous()
    rows, cols, positives, *maxima, _, _ = dot_lse_forward(
        x, y, scale, row_ids, col_ids, row_limits, first_positive, mask_positives, need_cols, need_max, budget, backend
    )
    return (rows, cols, positives, *maxima) if need_max else (rows, cols, positives)


@operator(SERVES)
def dot_lse_forward(
    x: Tensor, y: Tensor, scale: Tensor, row_ids: Tensor | None, col_ids: Tensor | None, row_limits: Tensor | None,
    first_positive: int, mask_positives: bool, need_cols: bool, need_max: bool, budget: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> rows (n,), cols (m,) or (0,), positives (n,), row maxima (n,) or (0,), column maxima (m,) or (0,), stash
    shift (), stash (empty where it exceeds the budget).

    The stash shift is that of the exponentials in the stash, NaN where it was not written; without a stash it is what
    the backend's own backward wants.
    """
    checks.positive("logit_scale", scale)
    problem = LseProblem(x, y, scale, row_ids, col_ids, first_positive, mask_positives, row_limits)
    stash = _stash(x, y, budget, backend, native_call.scratch if x.device.type == "cpu" else torch.empty)
    outputs = backends.run("dot_lse", "forward", backend, (x, y), problem, need_cols, need_max, stash)
    return *outputs, stash


@dot_lse_forward.register_fake
def _(x, y, scale, row_ids, col_ids, row_limits, first_positive, mask_positives, need_cols, need_max, budget, backend):
    n, m = x.shape[0], y.shape[0] if need_cols else 0
    new = scale.new_empty
    maxima = (new((n,)), new((m,))) if need_max else (new((0,)), new((0,)))
    return new((n,)), new((m,)), new((n,)), *maxima, new(()), _stash(x, y, budget, backend, torch.empty)


def _stash(x: Tensor, y: Tensor, budget: int, backend: str, allocate: Callable[..., Tensor]) -> Tensor:
    """Room for the exponentials in the layout of the backend that will write them."""
    shape, dtype = backends.choose("dot_lse", backend, x, y).stash_shape(x.shape[0], y.shape[0], x.dtype)
    fits = math.prod(shape) * dtype.itemsize <= budget
    return allocate(shape if fits else (0,), dtype=dtype, device=x.device)


@operator(SERVES)
def dot_lse_backward(
    g_rows: Tensor,
    g_cols: Tensor,
    g_positives: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_limits: Tensor | None,
    rows: Tensor,
    cols: Tensor,
    positives: Tensor,
    stash_shift: Tensor,
    stash: Tensor,
    first_positive: int,
    mask_positives: bool,
    need_dx: bool,
    need_dy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx (n, d), dy (m, d), each empty unless needed, and dscale ()."""
    problem = LseProblem(x, y, scale, row_ids, col_ids, first_positive, mask_positives, row_limits)
    sums = LseSums(rows, cols, positives, stash_shift, stash)
    gradients = LseGradients(g_rows.contiguous(), g_cols.contiguous(), g_positives.contiguous())
    return backends.run("dot_lse", "backward", backend, (x, y), problem, sums, gradients, need_dx, need_dy)


@dot_lse_backward.register_fake
def _(g_rows, g_cols, g_positives, x, y, scale, *rest):
    *_, need_dx, need_dy, _ = rest
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dy = torch.empty_like(y) if need_dy else y.new_empty(0)
    return dx, dy, torch.empty_like(scale)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.first_positive, ctx.mask_positives, _, _, _, ctx.backend = inputs
    rows, cols, positives, row_max, col_max, *stash = output
    ctx.mark_non_differentiable(row_max, col_max, *stash)
    ctx.set_materialize_grads(False)  # zeros of the stash's n x m
    ctx.save_for_backward(*tensors, rows, cols, positives, *stash)


def _backward(ctx, g_rows, g_cols, g_positives, *_):
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    saved = ctx.saved_tensors
    gradients = or_zeros((g_rows, g_cols, g_positives), saved[6:9])
    # dscale comes from <x, dx> or <y, dy>: one of the two is computed for it
    dx, dy, dscale = dot_lse_backward(
        *gradients,
        *saved,
        ctx.first_positive,
        ctx.mask_positives,
        need_x or not need_y,
        need_y,
        ctx.backend,
    )
    return dx if need_x else None, dy if need_y else None, dscale if need_scale else None, *(None,) * 9


dot_lse_forward.register_autograd(_backward, setup_context=_setup)
