"""additive_moments in C++: csrc/additive/moments, on the CPU and on CUDA, in every feature dtype.

On the CPU a and b are read in their dtype and widened a tile at a time; scores, sums and w are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.dispatch import backends, cuda_call
from cibr_kernels.dispatch.native_call import DTYPES, call
from cibr_kernels.primitives.additive.native import problem_fields, unlike_dtypes
from cibr_kernels.primitives.additive.problem import MomentsProblem, Needs

SCORE_BUDGET = 256 << 20  # bytes of scores that the CUDA kernels keep at a time; more rows than fit take several panels


def unsupported(*tensors: Tensor) -> str | None:
    """Float32, bfloat16 and float16; on the CPU a and b must share one."""
    if cuda_call.takes(*tensors):
        return cuda_call.unsupported(*tensors)
    return unlike_dtypes(*tensors) or backends.native_unsupported(*tensors)


def forward(problem: MomentsProblem, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> J (), L () float32 and the gradients of L: (n, h), (m, h), (h,) as their inputs, each empty unless needed."""
    a, w = problem.a, problem.w
    (n, m, h), (need_a, need_b, need_w) = problem.sizes, needs
    moments = torch.empty(2, dtype=torch.float32, device=a.device)
    da, db, dw = problem.gradients(needs)
    fields = problem_fields(problem) | {
        "first_positive": problem.first_positive, "include_diagonal": problem.include_diagonal, "need_a": need_a,
        "need_b": need_b, "need_w": need_w, "moments": moments, "da": da, "db": db,
    }  # fmt: skip
    if cuda_call.takes(a):
        processors = cuda_call.target(a.device).processors
        types = {"dtype": DTYPES[a.dtype], "w_dtype": DTYPES[w.dtype]}
        machine = {"processors": processors, "score_budget": SCORE_BUDGET}
        cuda_call.call("additive_moments", "AdditiveMomentsCuda", **fields, w=w, dw=dw, **types, **machine)
    else:
        wide_dw = dw.float()
        types = {"features_dtype": DTYPES[a.dtype]}
        call("additive_moments", "AdditiveMoments", n * m * h, **fields, w=w.float(), dw=wide_dw, **types)
        dw = wide_dw.to(w.dtype)
    return moments[0].clone(), moments[1].clone(), da, db, dw
