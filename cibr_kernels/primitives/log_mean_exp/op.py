"""log-mean-exp of a tensor of scores in one pass, float32 inside, with MINE's moving-average gradient on request.

L = log 1/|P| sum_P exp s        ds = exp(s - L) / |P|
with ema:  L + (kappa - 1)(L - L.detach()),  kappa = exp(L - ema): the value is L, the gradient that of exp(L)/e^ema
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels import checks
from cibr_kernels.dispatch import backends
from cibr_kernels.dispatch.library import operator
from cibr_kernels.numerics import sum_dtype

SERVES = "log_mean_exp, or an estimate with k partners"


def log_mean_exp(
    scores: Tensor, *, mask: Tensor | None = None, ema: Tensor | float | None = None, backend: str = "auto"
) -> Tensor:
    """log(mean(exp(scores))) over all entries, or over those where `mask` is True: a float32 scalar.

    Args:
        scores: any shape, float32, bfloat16, float16 or float64.
        mask: bool, the shape of scores; True entries count, and |P| is their number.
        ema: the log of a moving average of mean(exp(scores)), 0-d; the gradient is corrected by exp(L - ema), equation
            12 of MINE (1801.04062).  No gradient flows into it; `nn.LogEMA` keeps one.

    Raises TypeError for dtypes, ValueError for an empty tensor, a mask of another shape, or (on the CPU; on a GPU the
    result is NaN) one with no True entry.
    """
    if not isinstance(scores, Tensor) or scores.dtype not in checks.FLOATS:
        raise TypeError(f"scores must be a floating tensor, got {getattr(scores, 'dtype', type(scores).__name__)}")
    checks.not_transformed("scores", scores)
    if scores.numel() == 0:
        raise ValueError(f"scores is empty: shape {tuple(scores.shape)}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        if mask.shape != scores.shape or mask.device != scores.device:
            raise ValueError(
                f"mask is {tuple(mask.shape)} on {mask.device} but scores is {tuple(scores.shape)} on {scores.device}"
            )
        mask = checks.usable(mask.contiguous())
    log_ema = None if ema is None else checks.scalar("ema", ema, scores)
    el = log_mean_exp_forward(scores.contiguous(), mask, backend)
    if log_ema is None:
        return el.clone() if el.requires_grad else el  # el is kept for the backward, the caller's may change in place
    return ema_corrected(el, log_ema)


def ema_corrected(el: Tensor, log_ema: Tensor) -> Tensor:
    """L with the gradient of exp(L) / exp(log_ema): value L, gradient kappa dL with kappa = exp(L - log_ema)."""
    kappa = (el - log_ema).exp().detach()
    return el.detach() + kappa * (el - el.detach())


@operator(SERVES)
def log_mean_exp_forward(scores: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    """-> L (), float32 (float64 for float64)."""
    if mask is not None and scores.device.type == "cpu" and not mask.any():
        raise ValueError("mask has no True entry: the mean of nothing")
    return backends.run("log_mean_exp", "forward", backend, (scores,), scores, mask)


@log_mean_exp_forward.register_fake
def _(scores, mask, backend):
    return scores.new_empty((), dtype=sum_dtype(scores))


@operator(SERVES)
def log_mean_exp_backward(grad: Tensor, scores: Tensor, mask: Tensor | None, el: Tensor, backend: str) -> Tensor:
    """-> dscores, the shape and dtype of scores."""
    return backends.run("log_mean_exp", "backward", backend, (scores,), grad, scores, mask, el)


@log_mean_exp_backward.register_fake
def _(grad, scores, mask, el, backend):
    return torch.empty_like(scores)


def _setup(ctx, inputs, output) -> None:
    scores, mask, ctx.backend = inputs
    ctx.save_for_backward(scores, mask, output)


def _backward(ctx, grad):
    scores, mask, el = ctx.saved_tensors
    return log_mean_exp_backward(grad, scores, mask, el, ctx.backend), None, None


log_mean_exp_forward.register_autograd(_backward, setup_context=_setup)
