"""Symmetric InfoNCE (the CLIP loss) whose n x n logits are never stored in full.

    l_ij = scale * <x_i, y_j>                          positives p_i = l_i,offset+i
    R_i  = log sum_{j != pos} exp l_ij                 C_j the same over rows: `dot_lse`
    loss = 1/2n sum_i [softplus(R_i - p_i) + softplus(C_i - p_i)]         (one_way: 1/n, rows only)

softplus(R - p) is LSE - p with the positive inside the LSE: the same number, whose value and gradient keep their digits
when the loss is tiny.  Everything here is O(n); the passes over all pairs are `dot_lse`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cibr_kernels.distributed.lse import STRATEGIES, sharded_dot_lse
from cibr_kernels.distributed.shards import Agreement, Shards
from cibr_kernels.ops import checks
from cibr_kernels.ops.dot_lse.op import dot_lse


def clip_loss(
    image_features: Tensor,  # (n, d)
    text_features: Tensor,  # (n, d)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    one_way: bool = False,
    process_group: ProcessGroup | Shards | None = None,
    strategy: str = "gather",
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
        process_group: ranks whose rows make one batch, such as `dist.group.WORLD` (None before torch.distributed is
            initialised: one process).  Features are this rank's rows, shards may be uneven.  The mean of the returned
            losses over ranks is the loss of the whole batch, and gradients that DDP or FSDP average are its gradients,
            logit_scale's included: `cibr_kernels.distributed`.
        strategy: "gather" brings the texts of all ranks to every rank, O(total d) memory; "ring" passes them on, in
            O(n d), and computes the logits twice.
        backend: "auto", "native" (C++, CPU), "triton" (GPU) or "reference" (plain PyTorch, stores the n x n logits).

    Raises:
        TypeError, ValueError: dtype, device or shape mismatch, empty input, non-positive scale (checked on the CPU);
            ranks that disagree on width, dtype, device or options: on every rank, before any work.
        RuntimeError: the named backend cannot run here (every reason is given), a double backward, a rank that died.

    NaN or infinity in the features gives a NaN loss.  Under autocast the features are cast as a matmul would cast them.
    Source: Radford et al. 2021 (2103.00020), Figure 3.
    """
    checks.choice("strategy", strategy, STRATEGIES)
    with Agreement("clip_loss", process_group, one_way=one_way, strategy=strategy) as agreement:
        checks.matrix("image_features", image_features)
        checks.matrix("text_features", text_features)
        x, y = checks.autocast(image_features, text_features)
        checks.same_place(image_features=x, text_features=y)
        checks.same_rows(image_features=x, text_features=y)
        checks.same_width(image_features=x, text_features=y)
        scale = checks.scalar("logit_scale", logit_scale, x)
        bias = None if logit_bias is None else checks.scalar("logit_bias", logit_bias, x)
        if process_group is not None:  # dot_lse would refuse it too, while the other ranks wait for this one
            checks.positive("logit_scale", scale)
        agreement.describe(image_features=x, text_features=y)
    if agreement.shards is None:
        loss = rectangular_clip_loss(x, y, scale, one_way=one_way, backend=backend)
    else:
        loss = _sharded_clip_loss(x, y, scale, agreement.shards, one_way=one_way, strategy=strategy, backend=backend)
    return loss if bias is None else loss + 0.0 * bias


def rectangular_clip_loss(
    x: Tensor, y: Tensor, scale: Tensor, *, offset: int = 0, one_way: bool = False, backend: str = "auto"
) -> Tensor:
    """The loss of n rows against m >= offset + n columns, row i's positive being column offset + i.  No checks."""
    rows, cols, positives = dot_lse(x, y, scale, offset=offset, need_cols=not one_way, backend=backend)
    return _mean_loss(rows, None if one_way else cols[offset : offset + x.shape[0]], positives)


def _sharded_clip_loss(
    x: Tensor, y: Tensor, scale: Tensor, shards: Shards, *, one_way: bool, strategy: str, backend: str
) -> Tensor:
    """This rank's part of the loss of all ranks' rows, times the number of ranks."""
    rows, cols, positives = sharded_dot_lse(
        x, y, scale, shards, strategy=strategy, need_cols=not one_way, backend=backend
    )
    return _mean_loss(rows, None if one_way else cols, positives) * shards.share


def _mean_loss(rows: Tensor, cols: Tensor | None, positives: Tensor) -> Tensor:
    """Log-sum-exps without the positives and the positives, (n,) each -> (); only the rows without `cols`."""
    loss = softplus(rows - positives).mean()
    return loss if cols is None else (loss + softplus(cols - positives).mean()) / 2


def softplus(t: Tensor) -> Tensor:
    """log(1 + exp t); F.softplus stops being exact at 20."""
    return torch.logaddexp(t, torch.zeros_like(t))
