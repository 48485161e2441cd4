"""Symmetric InfoNCE (the CLIP loss) whose n x n logits are never stored in full.

    l_ij = scale * <x_i, y_j>                          positives p_i = l_i,offset+i
    R_i  = log sum_{j != pos} exp l_ij                 C_j the same over rows
    loss = 1/2n sum_i [softplus(R_i - p_i) + softplus(C_i - p_i)]         (one_way: 1/n, rows only)

    P_ij   = [exp(l_ij - LSE_i) + exp(l_ij - LSE_j)] / 2n  off the positives, where LSE includes them
    dp_i   = -[sigmoid(R_i - p_i) + sigmoid(C_i - p_i)] / 2n, added exactly in float32
    dx_i   = scale * (sum_j P_ij y_j + dp_i y_i)       dy_j the transpose       dscale = sum_i <x_i, dx_i> / scale

The forward saves R, C and p.  Two tiers: where the exponentials fit `stash_budget()` they are kept (1 + 2 matmul
passes), otherwise the backward computes the logits again (1 + 3) and memory is O((n + m) d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels import backends
from cibr_kernels.ops import checks

_STASH_BYTES = 64 * 2**20
_BLOCK = 32  # columns of a block of the stash: csrc/common/engine.h, kBlock


def stash_budget() -> int:
    """Bytes that `clip_loss` may spend on keeping exp(logits) for the backward.  Default: 64 MiB."""
    return _STASH_BYTES


def set_stash_budget(size: int) -> None:
    """Sets the budget of the stash tier in bytes; 0 turns it off.

    With n rows and m columns the stash takes n * m * 4 bytes for float32 and float16 features, n * m * 2 for bfloat16.
    """
    global _STASH_BYTES
    if size < 0:
        raise ValueError(f"the stash budget must not be negative, got {size}")
    _STASH_BYTES = size


def clip_loss(
    image_features: Tensor,  # (n, d)
    text_features: Tensor,  # (n, d)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    one_way: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The CLIP loss, a float32 scalar in nats, differentiable in features, scale and bias.

    Equal to `(cross_entropy(l, arange(n)) + cross_entropy(l.T, arange(n))) / 2` with
    `l = logit_scale * image_features @ text_features.T + logit_bias`, with logits and sums in float32 for every dtype.

    Args:
        image_features: (n, d) float32, bfloat16 or float16 (float64 runs the reference); usually of unit norm.
        text_features: (n, d), same dtype and device; row i belongs to row i of `image_features`.
        logit_scale: exp(log_scale) = 1 / temperature, a positive number or a one-element tensor.
        logit_bias: accepted for open_clip's signature; softmax ignores a constant, so its gradient is zero.
        one_way: only image -> text, equation 3 of CIBR (2503.24182).
        backend: "auto", "native" (C++, CPU) or "reference" (plain PyTorch, stores the n x n logits).

    Raises:
        TypeError, ValueError: dtype, device or shape mismatch, empty input, non-positive scale (checked on the CPU).
        RuntimeError: the named backend cannot run here (every reason is given), or a double backward.

    NaN or infinity in the features gives a NaN loss.  Under autocast the features are cast as a matmul would cast them.
    Source: Radford et al. 2021 (2103.00020), Figure 3.
    """
    checks.matrix("image_features", image_features)
    checks.matrix("text_features", text_features)
    x, y = checks.autocast(image_features, text_features)
    checks.same_place(image_features=x, text_features=y)
    checks.same_rows(image_features=x, text_features=y)
    checks.same_width(image_features=x, text_features=y)
    scale = checks.scalar("logit_scale", logit_scale, x)
    bias = None if logit_bias is None else checks.scalar("logit_bias", logit_bias, x)
    loss = rectangular_clip_loss(x, y, scale, one_way=one_way, backend=backend)
    return loss if bias is None else loss + 0.0 * bias


def rectangular_clip_loss(
    x: Tensor, y: Tensor, scale: Tensor, *, offset: int = 0, one_way: bool = False, backend: str = "auto"
) -> Tensor:
    """The loss of n rows against m >= offset + n columns, row i's positive being column offset + i.  No checks."""
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or scale.requires_grad)
    itemsize = 2 if x.dtype == torch.bfloat16 else 4
    stash = needs_grad and x.shape[0] * y.shape[0] * itemsize <= _STASH_BYTES
    return clip_loss_forward(x.contiguous(), y.contiguous(), scale, offset, one_way, stash, backend)[0]


@torch.library.custom_op("cibr_kernels::clip_loss_forward", mutates_args=())
def clip_loss_forward(
    x: Tensor, y: Tensor, scale: Tensor, offset: int, one_way: bool, stash: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss (), LSE of rows (n,) and columns (m,) without the positives, positives (n,), stash and its offset ()."""
    checks.positive("logit_scale", scale)
    kept = _empty_stash(x, y, stash)
    outputs = backends.choose("clip_loss", backend, x, y).forward(x, y, scale, offset, one_way, kept)
    return *outputs, kept


@clip_loss_forward.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor, offset: int, one_way: bool, stash: bool, backend: str):
    n, m = x.shape[0], y.shape[0]
    new = scale.new_empty
    return new(()), new((n,)), new((m,)), new((n,)), new(()), _empty_stash(x, y, stash)


@torch.library.custom_op("cibr_kernels::clip_loss_backward", mutates_args=())
def clip_loss_backward(
    grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, row_lse: Tensor, col_lse: Tensor, positives: Tensor,
    stash_offset: Tensor, stash: Tensor, offset: int, one_way: bool, need_dx: bool, need_dy: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx (n, d), dy (m, d), each empty unless needed, and dscale ()."""
    return backends.choose("clip_loss", backend, x, y).backward(
        grad, x, y, scale, row_lse, col_lse, positives, stash_offset, stash, offset, one_way, need_dx, need_dy
    )


@clip_loss_backward.register_fake
def _(grad, x, y, scale, row_lse, col_lse, positives, stash_offset, stash, offset, one_way, need_dx, need_dy, backend):
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dy = torch.empty_like(y) if need_dy else y.new_empty(0)
    return dx, dy, torch.empty_like(scale)


def _empty_stash(x: Tensor, y: Tensor, stash: bool) -> Tensor:
    if not stash:
        return x.new_empty(0)
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    return x.new_empty(((y.shape[0] + _BLOCK - 1) // _BLOCK, x.shape[0], _BLOCK), dtype=dtype)


def _setup(ctx, inputs, output) -> None:
    x, y, scale, ctx.offset, ctx.one_way, _, ctx.backend = inputs
    _, *saved = output
    ctx.save_for_backward(x, y, scale, *saved)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    # dscale comes from <x, dx> or <y, dy>: one of the two is computed for it
    dx, dy, dscale = clip_loss_backward(
        grad, *ctx.saved_tensors, ctx.offset, ctx.one_way, need_x or not need_y, need_y, ctx.backend
    )
    return dx if need_x else None, dy if need_y else None, dscale if need_scale else None, None, None, None, None


clip_loss_forward.register_autograd(_backward, setup_context=_setup)
