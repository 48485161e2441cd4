"""The plain siglip_loss in Triton: dot_softplus's sweep, with the positives in its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.dispatch import plans
from cibr_kernels.primitives.dot.lse.triton_configs import tf32_allowed
from cibr_kernels.primitives.dot.softplus import triton as dot_softplus


def forward(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, share: float, need_dx: bool, need_dy: bool
) -> tuple[Tensor, ...]:
    """-> the loss () and dx, dy (n, d), each empty unless needed, dscale (), dbias ()."""

    def direction(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return dot_softplus.mean_loss(x, y, scale, bias, share, need_dx, need_dy)

    return plans.run(_key(x, share, need_dx, need_dy), direction, (x, y, scale, bias))


def known(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, share: float, need_dx: bool, need_dy: bool
) -> plans.Plan | None:
    """The plan of `forward`, where such a call was made before: then these tensors need no check."""
    return plans.find(_key(x, share, need_dx, need_dy), (x, y, scale, bias))


def _key(x: Tensor, share: float, need_dx: bool, need_dy: bool) -> tuple[object, ...]:
    tf32 = x.dtype == torch.float32 and tf32_allowed()
    return "siglip_loss", share, need_dx, need_dy, tf32


def times(
    g: Tensor, dx: Tensor, dy: Tensor, dscale: Tensor, dbias: Tensor, dtype: torch.dtype, plan: plans.Plan | None = None
) -> tuple[Tensor, ...]:
    """g () times each of `forward`'s gradients, dx and dy in the features' dtype.  plan: `forward`'s, if known."""

    def direction(*tensors: Tensor) -> tuple[Tensor, ...]:
        g, dx, dy, dscale, dbias = tensors
        return dot_softplus.times(g, dx, dy, dscale, dbias, dtype)

    return plans.run_after(plan, ("siglip_loss backward", dtype), direction, (g, dx, dy, dscale, dbias), 1)
