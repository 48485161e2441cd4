"""additive_moments in C++: csrc/additive/moments, on the CPU and on CUDA, in every feature dtype.

On the CPU a and b are read in their dtype and widened a tile at a time; scores, sums and w are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import backends, cuda_call
from cibr_kernels.dispatch.native_call import DTYPES, call
from cibr_kernels.primitives.additive.moments.reference import ACTIVATIONS

SCORE_BUDGET = 256 << 20  # bytes of scores that the CUDA kernels keep at a time; more rows than fit take several panels


def unsupported(*tensors: Tensor) -> str | None:
    """Float32, bfloat16 and float16; on the CPU a and b must share one."""
    if cuda_call.takes(*tensors):
        return cuda_call.unsupported(*tensors)
    if tensors[0].dtype != tensors[1].dtype:
        return f"the C++ kernel takes a and b of one dtype, got {tensors[0].dtype} and {tensors[1].dtype}"
    return backends.native_unsupported(*tensors)


def forward(
    a: Tensor, b: Tensor, w: Tensor, activation: str, slope: float, first_positive: int, include_diagonal: bool,
    need_a: bool, need_b: bool, need_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> J (), L () float32 and the gradients of L: (n, h), (m, h), (h,) as their inputs, each empty unless needed."""
    moments = torch.empty(2, dtype=torch.float32, device=a.device)
    ga, gb, gw = (
        torch.empty_like(t) if need else t.new_empty(0) for t, need in ((a, need_a), (b, need_b), (w, need_w))
    )
    fields: dict[str, Any] = dict(  # noqa: C408
        a=a,
        b=b,
        n=a.shape[0],
        m=b.shape[0],
        h=a.shape[1],
        first_positive=first_positive,
        include_diagonal=include_diagonal,
        activation=list(ACTIVATIONS).index(activation),
        slope=slope,
        need_a=need_a,
        need_b=need_b,
        need_w=need_w,
        moments=moments,
        ga=ga,
        gb=gb,
    )
    if cuda_call.takes(a):
        found = cuda_call.target(a.device)
        cuda_call.call(
            "additive_moments", "AdditiveMomentsCuda", **fields, w=w, gw=gw, dtype=DTYPES[a.dtype],
            w_dtype=DTYPES[w.dtype], processors=found.processors, score_budget=SCORE_BUDGET,
        )  # fmt: skip
    else:
        wide_gw = gw.float()
        call(
            "additive_moments", "AdditiveMoments", a.numel() * b.shape[0], **fields, w=w.float(), gw=wide_gw,
            features_dtype=DTYPES[a.dtype],
        )  # fmt: skip
        gw = wide_gw.to(w.dtype)
    return moments[0].clone(), moments[1].clone(), ga, gb, gw
