"""The plain siglip_loss in Triton: dot_softplus's sweep, with the positives in its kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cibr_kernels.dispatch import plans
from cibr_kernels.primitives.dot.lse.triton_configs import tf32_allowed
from cibr_kernels.primitives.dot.softplus import triton as dot_softplus


def forward(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, share: float, need_dx: bool, need_dy: bool
) -> tuple[Tensor, ...]:
    """-> the loss () and, where one of them is needed, dx, dy (n, d), each empty unless needed, dscale (), dbias ()."""
    loss, *kept = forward_kept(x, y, scale, bias, share, need_dx, need_dy)
    return (loss, *dot_softplus.gradients(kept, x)) if kept else (loss,)


def forward_kept(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, share: float, need_dx: bool = True, need_dy: bool = True
) -> tuple[Tensor, ...]:
    """-> the loss () and, where a gradient is needed, what `times` reads."""

    def direction(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return dot_softplus.mean_loss(x, y, scale, bias, share, need_dx, need_dy)

    return plans.run(_key(x, share, need_dx, need_dy), direction, (x, y, scale, bias))


def known(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, share: float) -> plans.Plan | None:
    """The plan of `forward_kept`, where such a call was made before: then these tensors need no check."""
    return plans.find(_key(x, share, True, True), (x, y, scale, bias))


def _key(x: Tensor, share: float, need_dx: bool, need_dy: bool) -> tuple[object, ...]:
    tf32 = x.dtype == torch.float32 and tf32_allowed()
    return "siglip_loss", share, need_dx, need_dy, tf32


def times(g: Tensor, x: Tensor, kept: Sequence[Tensor], plan: plans.Plan | None) -> tuple[Tensor, ...]:
    """g () times each gradient, dx and dy in the dtype of x.  kept: what `forward_kept` made; plan: its, if known."""

    def direction(g: Tensor, x: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        return dot_softplus.times(g, x, kept)

    return plans.run_after(plan, ("siglip_loss backward",), direction, (g, x, *kept), 1)
