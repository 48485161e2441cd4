"""additive_moments in C++: csrc/additive_moments."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels import backends
from cibr_kernels.ops.additive_moments.reference import ACTIVATIONS
from cibr_kernels.ops.native_call import call


def unsupported(*tensors: Tensor) -> str | None:
    """Float32 on the CPU only; critic_moments converts."""
    if any(t.dtype != torch.float32 for t in tensors):
        return f"the C++ kernel takes float32, got {', '.join(str(t.dtype) for t in tensors)}"
    return backends.native_unsupported(*tensors)


def forward(
    a: Tensor, b: Tensor, w: Tensor, activation: str, slope: float, offset: int, include_diagonal: bool,
    need_a: bool, need_b: bool, need_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> J (), L () and the gradients of L: (n, h), (m, h), (h,), each empty unless needed."""
    moments = torch.empty(2, dtype=torch.float32)
    ga, gb, gw = (
        torch.empty_like(t) if need else t.new_empty(0) for t, need in ((a, need_a), (b, need_b), (w, need_w))
    )
    call(
        "additive_moments", "AdditiveMoments", a=a, b=b, w=w, n=a.shape[0], m=b.shape[0], h=a.shape[1], offset=offset,
        include_diagonal=include_diagonal, activation=list(ACTIVATIONS).index(activation), slope=slope, need_a=need_a,
        need_b=need_b, need_w=need_w, moments=moments, ga=ga, gb=gb, gw=gw,
    )  # fmt: skip
    return moments[0].clone(), moments[1].clone(), ga, gb, gw
