"""additive_moments in Triton: one sweep over panels of rows, eight launches when the exponentials fit the budget.

    pack | per panel: scores, merge, weigh, gradient of a, gradient of b | finish, reduce

Without gradients: pack, scores, merge.  Workspace: e^S of a panel in both orders, within PANEL_BYTES unless one block
of rows needs more; the packed projections and the unscaled gradients, O((n + m) h).  No S is computed twice.

A group of critics takes as many launches as one.  Backward: two, for da and db, and for dw.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import plans, triton_call
from cibr_kernels.numerics import ceil_div, panel_rows, round_up
from cibr_kernels.primitives.additive.moments.positives import OfL
from cibr_kernels.primitives.additive.problem import MomentsProblem, Needs

PANEL_BYTES = 256 << 20
KINKED = ("relu", "leaky_relu")  # phi = t phi': dw comes free with da and db
POSITIVES = {"BLOCK_R": 32, "BLOCK_H": 64}  # rows of b, features
PAD = 64  # rows and widths of packed arrays are multiples of it, and every block divides it


@dataclass(frozen=True)
class Config:
    """block x block pairs of scores; block rows x block_h features of a gradient; how many terms of a sum at a time."""

    num_warps: int
    unroll: int  # of the sum over h
    unroll_gradient: int  # of the sum over rows
    block: int = 64
    block_h: int = 64
    most_splits: int = 8  # pieces of the sum over rows, where there are too few blocks for the machine


CONFIGS = {"kinked": Config(4, 4, 4), "smooth": Config(8, 1, 1)}  # no spills on sm_80/90/100/120, gfx942, gfx1100


def forward(problem: MomentsProblem, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> J (), L () float32 and the gradients of L: (n, h), (m, h), (h,) as their inputs, each empty unless needed."""

    def direction(a: Tensor, b: Tensor, w: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        return _forward(replace(problem, a=a, b=b, w=w, bias=bias[0] if bias else None), needs)

    bias = () if problem.bias is None else (problem.bias,)
    key = "additive_moments forward", *_options(problem), problem.include_diagonal, needs, len(bias), PANEL_BYTES
    j, el, da, db, dw = plans.run(key, direction, (problem.a, problem.b, problem.w, *bias))
    return j, el, da, db, dw


def _options(problem: MomentsProblem) -> tuple[Hashable, ...]:
    """What launches depend on besides tensors."""
    return problem.activation, problem.slope, problem.first_positive


def _forward(problem: MomentsProblem, needs: Needs) -> tuple[Tensor, ...]:
    sweep = Sweep(problem, needs)
    sweep.pack()
    for panel in range(sweep.panels):
        sweep.scores(panel)
        if sweep.side_a or sweep.side_b:
            sweep.weigh(panel)
            sweep.gradients(panel)
    return sweep.j, sweep.el, *sweep.finish()


class Sweep:
    """The buffers of one call, sized by shapes alone, and its launches."""

    def __init__(self, problem: MomentsProblem, needs: Needs) -> None:
        self.problem, self.needs = problem, needs
        self.n, self.m, self.h = problem.sizes
        self.groups = groups = problem.groups
        need_a, need_b, need_w = needs
        kinked = problem.activation in KINKED
        self.config = config = CONFIGS["kinked" if kinked else "smooth"]
        self.side_a = need_a or need_w  # the sums over columns, with dw for the smooth activations
        self.side_b = need_b or (need_w and kinked)  # the sums over rows
        self.own_weights = need_w and not kinked

        block = config.block
        self.n_padded, self.m_padded, self.h_padded = (
            round_up(self.n, PAD),
            round_up(self.m, PAD),
            round_up(self.h, PAD),
        )
        copies = groups * (self.side_a + self.side_b)  # of the exponentials; without any one panel has all rows
        self.rows = panel_rows(PANEL_BYTES, 4 * self.m_padded * copies, self.n, block, block) if copies else self.n
        self.panels = ceil_div(self.n, self.rows)
        self.blocks_a, self.blocks_b, self.blocks_h = (
            ceil_div(self.n, block), ceil_div(self.m, block), ceil_div(self.h, config.block_h),
        )  # fmt: skip
        blocks_panel = ceil_div(self.rows, block)
        processors = triton_call.target(problem.a.device).processors
        self.splits_a = _splits(groups * blocks_panel * self.blocks_h, self.m, processors, config)
        self.splits_b = _splits(groups * self.blocks_b * self.blocks_h, self.rows, processors, config)

        new = self._new
        self.packed = {
            "a_packed": new(groups, self.h_padded, self.n_padded),
            "b_packed": new(groups, self.h_padded, self.m_padded), "w_packed": new(groups, self.h_padded),
            "zeros": new(max(self.n_padded, self.m_padded)),
        }  # fmt: skip
        self.pack_grid = ((self.n_padded + self.m_padded) // PAD, self.h_padded // PAD, groups)
        self.bad, self.typical = new(math.prod(self.pack_grid), dtype=torch.int32), new(groups, 2, self.h_padded)
        self.tops, self.totals = (new(groups * blocks_panel * self.blocks_b) for _ in range(2))
        self.positives, self.run = new(groups, self.n), new(groups, self.panels + 1, 2)
        self.j, self.el = new(*problem.grouped), new(*problem.grouped)
        self.exponentials = exponentials = blocks_panel * block * self.m_padded  # of one critic
        self.s = new(groups * exponentials if self.side_a or self.side_b else 0)
        self.s_transposed = new(groups * exponentials if self.side_a else 0)
        self.ua = new(groups * self.splits_a * self.n * self.h if self.side_a else 0)
        self.ub = new(groups * self.splits_b * self.m * self.h if self.side_b else 0)
        self.uw_rows = self.blocks_a * self.splits_a
        self.uw = new(groups * self.uw_rows * self.h if self.own_weights else 0)

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.problem.a.device)

    def pack(self) -> None:
        """Transposes in float32, for loads of neighbouring columns, and looks for numbers that are not finite."""
        sizes = {"n": self.n, "m": self.m, "width": self.h, "n_padded": self.n_padded, "m_padded": self.m_padded}
        arguments = {
            "a": self.problem.a,
            "b": self.problem.b,
            "w": self.problem.w,
            **self.packed,
            "bad": self.bad,
            "typical": self.typical,
            **sizes,
        }
        triton_call.launch(
            _kernels().additive_moments_pack_kernel,
            self.pack_grid,
            arguments,
            {"BLOCK_R": PAD, "BLOCK_H": PAD},
            num_warps=8,
        )

    def scores(self, panel: int) -> None:
        """S of the panel's pairs, or only what J and L need of them, and the running sum of exponentials."""
        first, end = self.rows_of(panel)
        tiles = ceil_div(end - first, self.config.block) * self.blocks_b
        sums = {"positives": self.positives, "tops": self.tops, "totals": self.totals}
        triton_call.launch(
            _kernels().additive_moments_scores_kernel,
            (tiles, self.groups),
            {
                **self.packed,
                "s": self.s,
                **sums,
                "first": first,
                "end": end,
                "m": self.m,
                "first_positive": self.problem.first_positive,
                "n": self.n,
                "width_padded": round_up(self.h, self.config.unroll),
                "width_packed": self.h_padded,
                "n_padded": self.n_padded,
                "m_padded": self.m_padded,
                "s_group": self.exponentials,
                "slope": self.problem.slope,
            },
            {
                "ACTIVATION": self.problem.activation,
                "INCLUDE": self.problem.include_diagonal,
                "KEEP": self.side_a or self.side_b,
                "BLOCK_I": self.config.block,
                "BLOCK_J": self.config.block,
                "UNROLL": self.config.unroll,
                "GROUP": 8,
            },
            num_warps=self.config.num_warps,
        )
        bias = self.problem.bias
        pairs = self.n * self.m - (0 if self.problem.include_diagonal else self.n)
        triton_call.launch(
            _kernels().additive_moments_merge_kernel, (self.groups,),
            {**sums, "run": self.run, "panel": panel, "panels": self.panels, "tiles": tiles, "n": self.n,
             "bad": self.bad, "bads": self.bad.numel() // self.groups, "bias": self.j if bias is None else bias,
             "j": self.j, "el": self.el,
             "log_pairs": math.log(pairs) if pairs else -math.inf},
            {"LAST": panel == self.panels - 1, "BIAS": bias is not None, "BLOCK": 512},
        )  # fmt: skip

    def weigh(self, panel: int) -> None:
        """S of the panel's pairs to their weights, in the panel's unit, in both orders where both are needed."""
        first, end = self.rows_of(panel)
        block, stride = self.config.block, round_up(end - first, self.config.block)
        triton_call.launch(
            _kernels().additive_moments_weigh_kernel, (stride // block * (self.m_padded // block), self.groups),
            {"s": self.s, "s_transposed": self.s_transposed, "run": self.run, "panel": panel, "panels": self.panels,
             "rows_padded": stride, "m_padded": self.m_padded, "s_group": self.exponentials},
            {"KEEP": self.side_b, "TRANSPOSE": self.side_a, "BLOCK": block},
        )  # fmt: skip

    def gradients(self, panel: int) -> None:
        """Adds the panel's pairs to the unscaled gradients."""
        first, end = self.rows_of(panel)
        block, stride = self.config.block, round_up(end - first, self.config.block)
        state = {"run": self.run, "panel": panel, "panels": self.panels}
        here = {"x": self.problem.a[..., first:end, :], "rows": self.n}
        there = {"x": self.problem.b, "rows": self.m}
        if self.side_a:
            self._gradient(
                self.splits_a,
                here, there, end - first, self.m,
                {"e": self.s_transposed, "u": self.ua[first * self.h :], **state,
                 "first_block": first // block, "stride": stride, "u_stride": self.n * self.h},
                {"ADD": False, "WEIGHTS": self.own_weights},
            )  # fmt: skip
        if self.side_b:
            self._gradient(
                self.splits_b,
                there, here, self.m, end - first,
                {"e": self.s, "u": self.ub, **state, "first_block": 0,
                 "stride": self.m_padded, "u_stride": self.m * self.h},
                {"ADD": panel > 0, "WEIGHTS": False},
            )  # fmt: skip

    def _gradient(
        self, splits: int, own: dict[str, Any], other: dict[str, Any], rows: int, others: int,
        arguments: dict[str, Any], constants: dict[str, Any],
    ) -> None:  # fmt: skip
        grid = ceil_div(rows, self.config.block), self.blocks_h, splits * self.groups
        triton_call.launch(
            _kernels().additive_moments_gradient_kernel, grid,
            {"x": own["x"], "x_rows": own["rows"], "y": other["x"], "y_rows": other["rows"], **arguments,
             "s_group": self.exponentials, "uw": self.uw, "uw_rows": self.uw_rows, "rows": rows, "others": others,
             "width": self.h, "slope": self.problem.slope},
            {**constants, "ACTIVATION": self.problem.activation, "SPLITS": splits, "BLOCK_R": self.config.block,
             "BLOCK_H": self.config.block_h, "UNROLL": self.config.unroll_gradient},
            num_warps=self.config.num_warps,
        )  # fmt: skip

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of L, scaled and in their dtypes."""
        (a, b, _), (need_a, need_b, need_w) = self.problem.tensors, self.needs
        da, db, dw = self.problem.gradients(self.needs)
        if not (self.side_a or self.side_b):
            return da, db, dw
        blocks = self.blocks_a * self.side_a + self.blocks_b * self.side_b
        partials = self._new(self.groups, blocks, self.h) if need_w else self._new(0)
        triton_call.launch(
            _kernels().additive_moments_finish_kernel, (blocks, self.blocks_h, self.groups),
            {"a": a, "b": b, "ua": self.ua, "ub": self.ub, "uw": self.uw, "da": da, "db": db, "partials": partials,
             "w_packed": self.packed["w_packed"], "typical": self.typical, "run": self.run, "panels": self.panels,
             "panel_rows": self.rows, "n": self.n, "m": self.m, "width": self.h, "width_padded": self.h_padded,
             "uw_rows": self.uw_rows},
            {"SPLITS_A": self.splits_a, "SPLITS_B": self.splits_b, "SIDE_A": self.side_a, "NEED_A": need_a,
             "NEED_B": need_b, "FREE_WEIGHTS": need_w and not self.own_weights,
             "OWN_WEIGHTS": self.own_weights, "BLOCK_R": self.config.block, "BLOCK_H": self.config.block_h},
            num_warps=8,
        )  # fmt: skip
        if need_w:
            summed = self.blocks_a if self.own_weights else blocks
            triton_call.launch(
                _kernels().sums_reduce_kernel, (self.blocks_h, self.groups),
                {"partials": partials, "out": dw, "blocks": summed, "width": self.h},
                {"BLOCK_R": 32, "BLOCK_H": self.config.block_h},
            )  # fmt: skip
        return da, db, dw

    def rows_of(self, panel: int) -> tuple[int, int]:
        return panel * self.rows, min((panel + 1) * self.rows, self.n)


def backward(
    g_j: Tensor | None, g_l: Tensor | None, problem: MomentsProblem, of_l: OfL, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """g_j, g_l () or (groups,), None for 0 -> da (n, h), db (m, h), dw (h,), each empty unless needed."""
    if not any(needs):
        da, db, dw = problem.gradients(needs)
        return da, db, dw
    upstream = {name: g.contiguous() for name, g in (("g_j", g_j), ("g_l", g_l)) if g is not None}
    kept = {name: t for name, t, need in zip(("a", "b", "w"), of_l, needs, strict=True) if need}

    def direction(a: Tensor, b: Tensor, w: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        here = replace(problem, a=a, b=b, w=w)
        gs = dict(zip(upstream, given, strict=False))
        return _backward(here, gs, dict(zip(kept, given[len(gs) :], strict=True)), needs)

    key = "additive_moments backward", *_options(problem), needs, *upstream
    tensors = problem.a, problem.b, problem.w, *upstream.values(), *kept.values()
    da, db, dw = plans.run(key, direction, tensors)
    return da, db, dw


def _backward(
    problem: MomentsProblem, upstream: Mapping[str, Tensor], of_l: Mapping[str, Tensor], needs: Needs
) -> tuple[Tensor, ...]:
    """upstream: g_j and g_l, those there are; of_l: the gradients of L in "a", "b" and "w", those that are needed."""
    (n, m, h), (a, b, w), (need_a, need_b, need_w) = problem.sizes, problem.tensors, needs
    da, db, dw = problem.gradients(needs)
    has = {"HAS_J": "g_j" in upstream, "HAS_L": "g_l" in upstream}
    shared = {name: upstream.get(name, w) for name in ("g_j", "g_l")}
    blocks, blocks_h = ceil_div(m, POSITIVES["BLOCK_R"]), ceil_div(h, POSITIVES["BLOCK_H"])
    partials = torch.empty(problem.groups * blocks * h if need_w else 0, dtype=torch.float32, device=a.device)
    triton_call.launch(
        _positives().additive_moments_positives_kernel, (blocks, blocks_h, problem.groups),
        {"a": a, "b": b, "w": w, **shared, "da_of_l": of_l.get("a", w), "db_of_l": of_l.get("b", w), "da": da, "db": db,
         "partials": partials, "n": n, "m": m, "first_positive": problem.first_positive, "width": h,
         "slope": problem.slope},
        {"ACTIVATION": problem.activation, **has, "NEED_A": need_a, "NEED_B": need_b, "NEED_W": need_w, **POSITIVES},
    )  # fmt: skip
    if need_w:
        triton_call.launch(
            _positives().additive_moments_positive_weights_kernel, (blocks_h, problem.groups),
            {"partials": partials, **shared, "dw_of_l": of_l["w"], "dw": dw, "n": n, "blocks": blocks, "width": h},
            {**has, **POSITIVES},
        )  # fmt: skip
    return da, db, dw


def _splits(blocks: int, others: int, processors: int, config: Config) -> int:
    """Pieces of a gradient's sum over `others` rows: more where the blocks alone would leave processors idle."""
    return max(1, min(config.most_splits, 4 * processors // blocks, others // (2 * config.block)))


def _kernels() -> ModuleType:
    from cibr_kernels.primitives.additive.moments import triton_kernels

    return triton_kernels


def _positives() -> ModuleType:
    from cibr_kernels.primitives.additive.moments import triton_positives

    return triton_positives
