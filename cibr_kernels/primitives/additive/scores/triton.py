"""additive_scores in Triton: pack and scores forward; backward the sweep of additive_moments, with a given gradient.

additive_moments' gradient of L is a sum over pairs, weighed by e^S / total.  Here grad weighs them, spread over the
same padded buffers, with a total of 1: its kernels, panels and budget (PANEL_BYTES) serve as they are.

Workspace: the packed projections, O((n + m) h); backward besides a panel of grad in both orders, within PANEL_BYTES
unless one block of rows needs more, and the unscaled gradients, O((n + m) h).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cibr_kernels.dispatch import triton_call
from cibr_kernels.numerics import ceil_div, round_up
from cibr_kernels.primitives.additive.moments import triton as moments
from cibr_kernels.primitives.additive.problem import AdditiveProblem, MomentsProblem, Needs


def forward(problem: AdditiveProblem) -> Tensor:
    """-> S (n, m), float32; a row that is not finite has NaN, all of S if w is not."""
    (n, m, h), (a, b, w) = problem.sizes, problem.tensors
    config = moments.CONFIGS["kinked" if problem.activation in moments.KINKED else "smooth"]
    n_padded, m_padded, h_padded = (round_up(size, moments.PAD) for size in (n, m, h))

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=a.device)

    out, packed = (
        new(n, m),
        {
            "a_packed": new(h_padded, n_padded),
            "b_packed": new(h_padded, m_padded),
            "w_packed": new(h_padded),
            "poison": new(n_padded + m_padded),
        },
    )
    sizes = {"n": n, "m": m, "n_padded": n_padded, "m_padded": m_padded}
    triton_call.launch(
        _kernels().additive_scores_pack_kernel,
        ((n_padded + m_padded) // moments.PAD,),
        {"a": a, "b": b, "w": w, **packed, **sizes, "width": h},
        {"BLOCK_R": moments.PAD, "BLOCK_H": moments.PAD},
        num_warps=8,
    )
    triton_call.launch(
        _kernels().additive_scores_forward_kernel,
        (ceil_div(n, config.block) * ceil_div(m, config.block),),
        {**packed, "out": out, **sizes, "width_padded": round_up(h, config.unroll), "slope": problem.slope},
        {
            "ACTIVATION": problem.activation,
            "BLOCK_I": config.block,
            "BLOCK_J": config.block,
            "UNROLL": config.unroll,
            "GROUP": 8,
        },
        num_warps=config.num_warps,
    )
    return out


def backward(grad: Tensor, problem: AdditiveProblem, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    """grad (n, m) float32 -> da (n, h), db (m, h), dw (h,), each empty unless needed; NaN for any number not finite."""
    a, b, w = problem.tensors
    every_pair = MomentsProblem(a, b, w, problem.activation, problem.slope, first_positive=0, include_diagonal=True)
    sweep = moments.Sweep(every_pair, needs)
    sweep.pack()
    block, tiles_j = sweep.config.block, sweep.m_padded // sweep.config.block
    wrong = torch.empty(sweep.blocks_a * tiles_j, dtype=torch.float32, device=a.device)
    sweep.run.zero_()  # every panel has the same unit
    for panel in range(sweep.panels):
        first, end = sweep.rows_of(panel)
        stride = round_up(end - first, block)
        triton_call.launch(
            _kernels().additive_scores_spread_kernel,
            (stride // block * tiles_j,),
            {
                "grad": grad[first:end],
                "s": sweep.s,
                "s_transposed": sweep.s_transposed,
                "wrong": wrong[first // block * tiles_j :],
                "rows": end - first,
                "m": sweep.m,
                "rows_padded": stride,
                "m_padded": sweep.m_padded,
            },
            {"KEEP": sweep.side_b, "TRANSPOSE": sweep.side_a, "BLOCK": block},
        )
        sweep.gradients(panel)
    triton_call.launch(
        _kernels().additive_scores_state_kernel,
        (1,),
        {
            "wrong": wrong,
            "wrongs": wrong.numel(),
            "bad": sweep.bad,
            "bads": sweep.bad.numel(),
            "w": sweep.packed["w_packed"],
            "width": sweep.h,
            "total": sweep.run[0, sweep.panels, 1:],
        },
        {"BLOCK": 512},
    )
    return sweep.finish()


def _kernels() -> ModuleType:
    from cibr_kernels.primitives.additive.scores import triton_kernels

    return triton_kernels
