"""additive_moments in C++: csrc/additive/moments, on the CPU and on CUDA, in every feature dtype.

On the CPU a and b are read in their dtype and widened a tile at a time; scores, sums and w are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import backends, cuda_call
from cibr_kernels.dispatch.native_call import DTYPES, call, scratch_like
from cibr_kernels.primitives.additive.moments.positives import OfL
from cibr_kernels.primitives.additive.native import problem_fields, unlike_dtypes
from cibr_kernels.primitives.additive.problem import MomentsProblem, Needs

SCORE_BUDGET = 256 << 20  # bytes of scores that the CUDA kernels keep at a time; more rows than fit take several panels
UNIT_WORK = 16  # multiply-adds that the CPU's backward takes for a unit of a row, reads and writes included


def unsupported(*tensors: Tensor) -> str | None:
    """Float32, bfloat16 and float16; on the CPU a and b must share one."""
    if cuda_call.takes(*tensors):
        return cuda_call.unsupported(*tensors)
    return unlike_dtypes(*tensors) or backends.native_unsupported(*tensors)


def forward(problem: MomentsProblem, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> J (), L () float32 and the gradients of L: (n, h), (m, h), (h,) as their inputs, each empty unless needed."""
    a, (need_a, need_b, need_w) = problem.a, needs
    shape = a.shape[:-2]
    j, el = (torch.empty(shape, dtype=torch.float32, device=a.device) for _ in range(2))
    da, db, dw = _gradients(problem, needs)
    fields = problem_fields(problem) | {
        "first_positive": problem.first_positive,
        "include_diagonal": problem.include_diagonal,
        "need_a": need_a,
        "need_b": need_b,
        "need_w": need_w,
        "w": problem.w,
        "bias": problem.bias,
        "j": j,
        "el": el,
        "da": da,
        "db": db,
    }
    if cuda_call.takes(a):
        processors = cuda_call.target(a.device).processors
        fields |= {"dw": dw, **_types(problem), "processors": processors, "score_budget": SCORE_BUDGET}
        cuda_call.call("additive_moments", "AdditiveMomentsCuda", fields)
        return j, el, da, db, dw
    wide_dw = dw.float()
    fields |= {"w": problem.w.float(), "dw": wide_dw, "features_dtype": DTYPES[a.dtype]}
    work = fields["n"] * fields["m"] * fields["h"]
    for k in range(problem.groups) if shape else (None,):
        call("additive_moments", "AdditiveMoments", work, fields if k is None else _of_critic(fields, k))
    return j, el, da, db, wide_dw.to(dw.dtype)


def _of_critic(fields: dict[str, Any], k: int) -> dict[str, Any]:
    """The fields of one problem of the group; what is no tensor, or is not wanted, is the same for all."""
    return {name: t[k] if isinstance(t, Tensor) and t.numel() else t for name, t in fields.items()}


def backward(
    g_j: Tensor | None, g_l: Tensor | None, problem: MomentsProblem, of_l: OfL, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """g_j, g_l () or (groups,), None for 0 -> da (n, h), db (m, h), dw (h,), each empty unless needed."""
    da, db, dw = _gradients(problem, needs)
    if not any(needs):
        return da, db, dw
    fields = problem_fields(problem) | {
        "first_positive": problem.first_positive,
        "da_of_l": of_l[0],
        "db_of_l": of_l[1],
        "da": da,
        "db": db,
        "g_j": None if g_j is None else g_j.contiguous(),
        "g_l": None if g_l is None else g_l.contiguous(),
    }
    if cuda_call.takes(problem.a):
        fields |= {"w": problem.w, "dw_of_l": of_l[2], "dw": dw, **_types(problem)}
        cuda_call.call("additive_moments_backward", "AdditiveMomentsBackwardCuda", fields)
        return da, db, dw
    wide_dw = dw.float()
    fields |= {"w": problem.w.float(), "dw_of_l": of_l[2].float(), "dw": wide_dw}
    fields |= {"groups": problem.groups, "features_dtype": DTYPES[problem.a.dtype]}
    call("additive_moments_backward", "AdditiveMomentsBackward", UNIT_WORK * problem.a.numel(), fields)
    return da, db, wide_dw.to(dw.dtype)


def _gradients(problem: MomentsProblem, needs: Needs) -> list[Tensor]:
    if cuda_call.takes(problem.a):
        return problem.gradients(needs)
    return [scratch_like(t) if need else t.new_empty(0) for t, need in zip(problem.tensors, needs, strict=True)]


def _types(problem: MomentsProblem) -> dict[str, int]:
    return {"dtype": DTYPES[problem.a.dtype], "w_dtype": DTYPES[problem.w.dtype], "groups": problem.groups}
