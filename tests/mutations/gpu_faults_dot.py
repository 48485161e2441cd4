"""Faults of the GPU kernels of dot products.  An anchor not found exactly once is an error."""

from __future__ import annotations

from mutations import Fault, delete, later

DOT, SOFTPLUS = "cibr_kernels/primitives/dot/lse/", "cibr_kernels/primitives/dot/softplus/"
FORWARD, BACKWARD, TILE = DOT + "triton_forward.py", DOT + "triton_backward.py", DOT + "triton_tile.py"
LIMITS = "dot_limits"
PAIRS, PASSES = SOFTPLUS + "triton_kernels.py", SOFTPLUS + "triton.py"

FAULTS = [
    # ---- dot_lse, Triton
    Fault(
        "scores above a limit summed",
        "dot_limits",
        FORWARD,
        "above_limit(acc * scale2, row",
        "above_limit(acc * 0, row",
    ),
    Fault(
        "a limit in nats beside scores in log2",
        "dot_limits",
        TILE,
        'other=float("inf")) * LOG2E)',
        'other=float("inf")))',
    ),
    Fault("gradients above a limit", LIMITS, BACKWARD, "above_limit(acc * scale2, row", "above_limit(acc * 0, row"),
    Fault("gradients above a limit, online", LIMITS, BACKWARD, "above_limit(l2, row", "above_limit(l2 * 0, row"),
    Fault("limits of the first rows", LIMITS, TILE, "row_limits + i, mask=i < n", "row_limits + i - row, mask=i < n"),
    Fault("column mask off by one", "dot", FORWARD, "& (j < m)[None, :]\n", "& (j <= m)[None, :]\n"),
    Fault("padding rows not masked", "dot", FORWARD, "keep = (i < n)[:, None] &", "keep = (i >= 0)[:, None] &"),
    Fault(
        "positives masked at the wrong first_positive",
        "dot",
        FORWARD,
        "!= i[:, None] + first_positive)",
        "!= i[:, None] + first_positive + 1)",
    ),
    Fault(
        "tiles of positives found without first_positive",
        "dot",
        TILE,
        "(col < row + BLOCK_M + first_positive)",
        "(col < row + BLOCK_M)",
    ),
    Fault("missing rescale of the running sum", "dot", FORWARD, "total * tl.exp2(top - finite) +", "total +"),
    Fault("maxima of other tiles ignored", "dot", FORWARD, "new = tl.maximum(top, other_top)", "new = other_top"),
    Fault("last features skipped", "dot", TILE, "range(0, d // BLOCK_K)", "range(0, d // BLOCK_K - 1)"),
    Fault("wrong row stride", "dot", TILE, "y_at = y + j[:, None] * d", "y_at = y + j[:, None] * (d + 1)"),
    Fault(
        "rows read past the end",
        "dot",
        TILE,
        "tl.minimum(col + tl.arange(0, BLOCK_N), m - 1)",
        "(col + tl.arange(0, BLOCK_N))",
    ),
    Fault(
        "sums rounded to bf16",
        "dot",
        TILE,
        "tl.load(y_at).T, acc, input_precision=PRECISION)",
        "tl.load(y_at).T, acc, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)",
    ),
    Fault("panels before forgotten", "dot", FORWARD, "old = inside & (fresh == 0)", "old = inside & (fresh < 0)"),
    Fault(
        "last tile of a fold skipped", "dot", FORWARD, "mask = (t < tiles)[:, None]", "mask = (t < tiles - 1)[:, None]"
    ),
    Fault(
        "missing zero-init of a sum",
        "dot",
        FORWARD,
        "total = tl.load(out_sum + at, mask=old, other=0.0)",
        "total = tl.load(out_sum + at, mask=inside, other=0.0)",
    ),
    Fault(
        "masked positives keep their weight",
        "dot",
        BACKWARD,
        "== i[:, None] + first_positive, 0.0, weight)",
        "== i[:, None] + first_positive, weight, weight)",
    ),
    Fault("gradient of the positives missing", "dot", BACKWARD, " * power + g_pair * other", " * power"),
    Fault(
        "positives of the wrong partner",
        "dot",
        BACKWARD,
        "there = (r + shift).to(tl.int64)",
        "there = (r + g_shift).to(tl.int64)",
    ),
    Fault("scale missing from dx", "dot", BACKWARD, "(grad * factor).to(", "grad.to("),
    Fault("scale applied to dscale", "dot", BACKWARD, "dot += tl.sum(grad *", "dot += tl.sum(grad * factor *"),
    Fault("shift of the stash not undone", "dot", BACKWARD, "rounded(stash_shift * LOG2E) - value2))", "-value2))"),
    Fault(
        "column weights with the rows' index",
        "dot",
        BACKWARD,
        "value = tl.load(e + at, mask=mask, other=0.0).to(tl.float32) * weight",
        "value = tl.load(e + at, mask=mask, other=0.0).to(tl.float32) * tl.load(v + i, mask=i < m, other=0.0)[:, None]",
    ),
    Fault(
        "power of two not undone", "dot", BACKWARD, "tl.exp2(-tl.load(exponent))", "tl.exp2(0.0 * tl.load(exponent))"
    ),
    Fault(
        "last block of a total skipped",
        "dot",
        BACKWARD,
        "total += tl.load(parts + at, mask=at < count, other=0.0)",
        "total += tl.load(parts + at, mask=at < count - 1, other=0.0)",
    ),
    Fault(
        "panel of P in the wrong rows",
        "dot",
        TILE,
        "tl.store(p + i.to(tl.int64)[:, None] * pitch",
        "tl.store(p + (first_row + i).to(tl.int64)[:, None] * pitch",
    ),
    *(
        Fault(f"bar.sync {k} deleted", "dot_sm80_bf16", kernel="dot_lse_scores_kernel", ptx=delete("bar.sync", k))
        for k in range(3)
    ),
    Fault(
        "copies waited for one group late",
        "dot_sm80_bf16",
        kernel="dot_lse_scores_kernel",
        ptx=later("cp.async.wait_group"),
    ),
    Fault(
        "wait for the last copies deleted",
        "dot_sm80_bf16",
        kernel="dot_lse_gradient_kernel",
        ptx=delete("cp.async.wait_group"),
    ),
    Fault(
        "wgmma waited for one group late", "dot_sm90", kernel="dot_lse_gradient_kernel", ptx=later("wgmma.wait_group")
    ),
    Fault("wgmma.wait_group deleted", "dot_sm90", kernel="dot_lse_scores_kernel", ptx=delete("wgmma.wait_group")),
    Fault("wait for TMA deleted", "dot_sm90", kernel="dot_lse_scores_kernel", ptx=delete("@!complete")),
    Fault("weights of the rows only", "dot_owned", BACKWARD, "* (weight_i + weight_j)", "* weight_i"),
    Fault(
        "positives of the transpose",
        "dot_owned",
        BACKWARD,
        "row, col, rows, partners, first_positive, MASK, IDS,",
        "row, col, rows, partners, -first_positive, MASK, IDS,",
    ),
    Fault(
        "online weight of the wrong side",
        "dot_owned",
        BACKWARD,
        "tl.exp2(l2 - high[None, :]) * weight_j",
        "tl.exp2(l2 - high[None, :]) * weight_i",
    ),
    Fault(
        "padding of partners read",
        "dot_owned",
        BACKWARD,
        "mask=(j < partners)[:, None] & (k < d)[None, :]",
        "mask=(k < d)[None, :]",
    ),
    Fault(
        "ids compared in 32 bits",
        "dot_groups",
        TILE,
        "return own[:, None] == tl.load(col_ids + j, mask=j < m, other=0)[None, :]",
        "return own.to(tl.int32)[:, None] == tl.load(col_ids + j, mask=j < m, other=0).to(tl.int32)[None, :]",
    ),
    Fault(
        "an underflow taken for the sum of nothing",
        "dot_groups",
        FORWARD,
        "asked = asked & found",
        "asked = asked & (first < 0)",
    ),
    Fault(
        "padding counted in the maximum",
        "dot_groups",
        FORWARD,
        'height = tl.load(part_max + place, mask=mask, other=-float("inf"))',
        "height = tl.load(part_max + place, mask=mask, other=0.0)",
    ),
    Fault(
        "maxima without the shift",
        "dot_groups",
        FORWARD,
        "(top + shift_log2) * LN2",
        "top * LN2",
    ),
    Fault(
        "masked pairs keep their weight",
        "dot_groups",
        BACKWARD,
        "col, n, m, BLOCK_M, BLOCK_N), 0.0, weight)",
        "col, n, m, BLOCK_M, BLOCK_N), weight, weight)",
    ),
    Fault(
        "columns of one row cannot underflow",
        "dot_alone",
        FORWARD,
        "((others > 1) | (at + shift != 0))",
        "(others > 1)",
    ),
    Fault(
        "ids of the transpose",
        "dot_owned_groups",
        DOT + "triton.py",
        '"own_ids": problem.row_ids, "partner_ids": problem.col_ids',
        '"own_ids": problem.col_ids, "partner_ids": problem.row_ids',
    ),
    # ---- dot_softplus, Triton
    Fault(
        "column mask off by one",
        "softplus",
        PAIRS,
        "(j < m)[None, :] & (j[None, :] !=",
        "(j <= m)[None, :] & (j[None, :] !=",
    ),
    Fault("padding rows not masked", "softplus", PAIRS, "counts = (i < n)[:, None] &", "counts = (i >= 0)[:, None] &"),
    Fault("padding rows not looked for", "softplus", PAIRS, " | (row + BLOCK_M > n)", ""),
    Fault(
        "positives at the wrong first_positive",
        "softplus",
        PAIRS,
        "!= i[:, None] + first_positive)",
        "!= i[:, None] + first_positive + 1)",
    ),
    Fault(
        "ids of the wrong rows",
        "softplus",
        PAIRS,
        "tl.load(row_ids + i,",
        "tl.load(row_ids + top + tl.arange(0, BLOCK_M),",
    ),
    Fault(
        "ids of the high 32 bits",
        "softplus",
        PAIRS,
        "own[:, None] == other[None, :]",
        "(own >> 32)[:, None] == (other >> 32)[None, :]",
    ),
    Fault(
        "attraction without its sign in G", "softplus", PAIRS, "g = tl.where(same, -g, g)", "g = tl.where(same, g, g)"
    ),
    Fault("pairs that attract left out", "softplus", PAIRS, "-t2 if ATTRACT else nothing", "nothing"),
    Fault("log(1 + u) that cancels", "softplus", PAIRS, "log1p = log1p_of(u)", "log1p = tl.log(1.0 + u)"),
    Fault("coefficient of the logarithm", "softplus", PAIRS, "q * u + 0.333213225", "q * u + 0.333203225"),
    Fault("sigmoid of the magnitude", "softplus", PAIRS, "tl.exp2(tl.minimum(t2, 0.0) - log1p", "tl.exp2(-log1p"),
    Fault(
        "column weights missing",
        "softplus",
        PAIRS,
        "weight = weight + tl.load(g_cols",
        "weight = weight + 0.0 * tl.load(g_cols",
    ),
    Fault(
        "bias not in units of log2",
        "softplus",
        PAIRS,
        "(tl.load(bias) + tl.load(poison)) * LOG2E",
        "(tl.load(bias) + tl.load(poison))",
    ),
    Fault("unit of dbias", "softplus", PAIRS, "tl.sum(total, 0) * tl.exp2(-tl.load(exponent))", "tl.sum(total, 0)"),
    Fault(
        "sums of another panel's tiles",
        "softplus",
        PAIRS,
        "col_tile.to(tl.int64) * rows",
        "col_tile.to(tl.int64) * (rows + 1)",
    ),
    Fault(
        "panels before forgotten",
        "softplus",
        PASSES,
        "else part_cols[0], 1 + self.grids",
        "else part_cols[0], self.grids",
    ),
    Fault("dy of the last panel only", "softplus", PASSES, "accumulate=first > 0)", "accumulate=False)"),
    Fault("first part of every panel the same", "softplus", PASSES, '"first_part": first_part}', '"first_part": 0}'),
    Fault(
        "copies waited for one group late",
        "softplus_sm80_bf16",
        kernel="dot_softplus_sweep_kernel",
        ptx=later("cp.async.wait_group"),
    ),
    *(
        Fault(
            f"bar.sync {k} deleted", "softplus_sm80_bf16", kernel="dot_softplus_sweep_kernel", ptx=delete("bar.sync", k)
        )
        for k in (1, 2)
    ),
]
