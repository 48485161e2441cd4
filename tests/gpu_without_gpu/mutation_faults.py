"""The faults that mutations.py plants.  An anchor not found exactly once is an error: update it with the kernel."""

from __future__ import annotations

from mutations import Fault, delete, later

DOT, ADDITIVE, CUDA = (
    "cibr_kernels/primitives/dot/lse/",
    "cibr_kernels/primitives/additive/moments/",
    "csrc/additive/moments/",
)
FORWARD, BACKWARD, TILE = DOT + "triton_forward.py", DOT + "triton_backward.py", DOT + "triton_tile.py"
KERNELS, LAUNCHER = ADDITIVE + "triton_kernels.py", ADDITIVE + "triton.py"
SOFTPLUS, SCORES = "cibr_kernels/primitives/dot/softplus/", "cibr_kernels/primitives/additive/scores/triton_kernels.py"
PAIRS, PASSES = SOFTPLUS + "triton_kernels.py", SOFTPLUS + "triton.py"

FAULTS = [
    # ---- dot_lse, Triton
    Fault("column mask off by one", "dot", FORWARD, "& (j < m)[None, :]\n", "& (j <= m)[None, :]\n"),
    Fault("padding rows not masked", "dot", FORWARD, "keep = (i < n)[:, None] &", "keep = (i >= 0)[:, None] &"),
    Fault(
        "positives masked at the wrong offset", "dot", FORWARD, "!= i[:, None] + offset)", "!= i[:, None] + offset + 1)"
    ),
    Fault(
        "tiles of positives found without offset",
        "dot",
        TILE,
        "(col < row + BLOCK_M + offset)",
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
        "== i[:, None] + offset, 0.0, weight)",
        "== i[:, None] + offset, weight, weight)",
    ),
    Fault("gradient of the positives missing", "dot", BACKWARD, " * power + g * other", " * power"),
    Fault(
        "positives of the wrong partner",
        "dot",
        BACKWARD,
        "there = (r + shift).to(tl.int64)",
        "there = (r + g_shift).to(tl.int64)",
    ),
    Fault("scale missing from dx", "dot", BACKWARD, "(grad * factor).to(", "grad.to("),
    Fault("scale applied to dscale", "dot", BACKWARD, "dot += tl.sum(grad *", "dot += tl.sum(grad * factor *"),
    Fault("offset of the stash not undone", "dot", BACKWARD, "rounded(stash_offset * LOG2E) - value2))", "-value2))"),
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
        Fault(f"bar.sync {k} deleted", "dot_sm80_bf16", kernel="scores_kernel", ptx=delete("bar.sync", k))
        for k in range(3)
    ),
    Fault(
        "copies waited for one group late",
        "dot_sm80_bf16",
        kernel="scores_kernel",
        ptx=later("cp.async.wait_group"),
    ),
    Fault(
        "wait for the last copies deleted",
        "dot_sm80_bf16",
        kernel="gradient_kernel",
        ptx=delete("cp.async.wait_group"),
    ),
    Fault("wgmma waited for one group late", "dot_sm90", kernel="gradient_kernel", ptx=later("wgmma.wait_group")),
    Fault("wgmma.wait_group deleted", "dot_sm90", kernel="scores_kernel", ptx=delete("wgmma.wait_group")),
    Fault("wait for TMA deleted", "dot_sm90", kernel="scores_kernel", ptx=delete("@!complete")),
    Fault("weights of the rows only", "dot_owned", BACKWARD, "* (weight_i + weight_j)", "* weight_i"),
    Fault(
        "positives of the transpose",
        "dot_owned",
        BACKWARD,
        "row, col, rows, partners, offset, MASK, IDS,",
        "row, col, rows, partners, -offset, MASK, IDS,",
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
        'height = tl.load(part_max + here, mask=mask, other=-float("inf"))',
        "height = tl.load(part_max + here, mask=mask, other=0.0)",
    ),
    Fault(
        "maxima without the offset",
        "dot_groups",
        FORWARD,
        "high = (tl.load(top + at, mask=inside, other=0.0) + offset2) * LN2",
        "high = tl.load(top + at, mask=inside, other=0.0) * LN2",
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
        "_Pairs(self.col_ids, self.row_ids, -self.offset",
        "_Pairs(self.row_ids, self.col_ids, -self.offset",
    ),
    # ---- additive_moments, Triton
    Fault(
        "column mask off by one",
        "additive",
        KERNELS,
        "inside = (i < end)[:, None] & (j < m)[None, :]",
        "inside = (i < end)[:, None] & (j <= m)[None, :]",
    ),
    Fault(
        "padding of the last panel not masked",
        "additive",
        KERNELS,
        "inside = (i < end)[:, None] & (j < m)",
        "inside = (i >= 0)[:, None] & (j < m)",
    ),
    Fault(
        "positives without the offset", "additive", KERNELS, "positive = (i + offset)[:, None]", "positive = i[:, None]"
    ),
    Fault(
        "positives not taken out",
        "additive",
        KERNELS,
        "inside = inside & (positive == 0)",
        "inside = inside & (positive >= 0)",
    ),
    Fault("missing rescale between panels", "additive", KERNELS, "total * tl.exp(before - shift)", "total"),
    Fault(
        "gradient not rescaled between panels",
        "additive",
        KERNELS,
        " * tl.exp(tl.load(run + 2 * panel) - tl.load(run + 2 * panel + 2))",
        "",
    ),
    Fault(
        "stale top of the first panel",
        "additive",
        KERNELS,
        "tl.load(run + 2 * (block * BLOCK_R // panel_rows) + 2)",
        "tl.load(run + 2)",
    ),
    Fault(
        "transpose with the wrong stride",
        "additive",
        KERNELS,
        "[None, :] * rows_padded + i[:, None], e)",
        "[None, :] * m_padded + i[:, None], e)",
    ),
    Fault("centre with the wrong sign", "additive", KERNELS, "w_packed, -centre, scale", "w_packed, centre, scale"),
    Fault(
        "last others read past the end",
        "additive",
        KERNELS,
        "tl.minimum(run_of + o, others - 1).to(tl.int64)",
        "(run_of + o).to(tl.int64)",
    ),
    Fault("weights missing from ga and gb", "additive", KERNELS, "(total * tl.load(w_packed + k)[None, :])", "total"),
    Fault(
        "last split skipped",
        "additive",
        KERNELS,
        "for split in tl.static_range(SPLITS):\n            total +=",
        "for split in tl.static_range(SPLITS - 1):\n            total +=",
    ),
    Fault(
        "pairs counted with the positives",
        "additive",
        LAUNCHER,
        "pairs = self.n * self.m - (0 if self.include else self.n)",
        "pairs = self.n * self.m",
    ),
    Fault(
        "sum of exponentials in bf16",
        "additive",
        KERNELS,
        "tl.sum(tl.exp(acc - shift), 1)",
        "tl.sum(tl.exp(acc - shift).to(tl.bfloat16), 1).to(tl.float32)",
    ),
    # ---- additive_moments, CUDA
    Fault(
        "barrier dropped after staging scores",
        "additive_cuda",
        CUDA + "scores.cuh",
        "    __syncthreads();\n  }\n\n  float highest",
        "  }\n\n  float highest",
    ),
    Fault(
        "barrier dropped before the first stage",
        "additive_cuda",
        CUDA + "scores.cuh",
        "  stage(0);\n  __syncthreads();\n",
        "  stage(0);\n",
    ),
    Fault(
        "barrier dropped in the sweep",
        "additive_cuda",
        CUDA + "gradients.cuh",
        "    if (more) stage(buffer ^ 1);\n    __syncthreads();",
        "    if (more) stage(buffer ^ 1);",
    ),
    Fault("copies not waited for", "additive_cuda", CUDA + "gradients.cuh", "    wait_copies();\n", ""),
    Fault(
        "copy into the buffer that is read",
        "additive_cuda",
        CUDA + "gradients.cuh",
        "fetch(at + OTHERS, buffer ^ 1)",
        "fetch(at + OTHERS, buffer)",
    ),
    Fault(
        "column mask off by one",
        "additive_cuda",
        CUDA + "scores.cuh",
        "global_row >= n || column >= m",
        "global_row >= n || column > m",
    ),
    Fault(
        "positives of the panel's row",
        "additive_cuda",
        CUDA + "scores.cuh",
        "column == global_row + offset",
        "column == row + offset",
    ),
    Fault(
        "panels before overwritten",
        "additive_cuda",
        CUDA + "gradients.cuh",
        "factor ? fmaf(keep, *out, total) : total",
        "total",
    ),
    Fault(
        "sum of the other buffer",
        "additive_cuda",
        CUDA + "gradients.cuh",
        "store4(&p[buffer][thread / 32 + 8 * i]",
        "store4(&p[0][thread / 32 + 8 * i]",
    ),
    Fault(
        "linear term of the wrong column",
        "additive_cuda",
        CUDA + "scores.cuh",
        "column_term[column]",
        "column_term[column0]",
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
    Fault("positives at the wrong offset", "softplus", PAIRS, "!= i[:, None] + offset)", "!= i[:, None] + offset + 1)"),
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
    Fault("log(1 + u) that cancels", "softplus", PAIRS, "log1p = _log1p(u)", "log1p = tl.log(1.0 + u)"),
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
        "else part_cols[0], 1 + strips[k])",
        "else part_cols[0], strips[k])",
    ),
    Fault("dy of the last panel only", "softplus", PASSES, "accumulate=k > 0)", "accumulate=False)"),
    Fault("first part of every panel the same", "softplus", PASSES, "sum(strips[:k]) * col_tiles}", "0}"),
    Fault(
        "copies waited for one group late",
        "softplus_sm80_bf16",
        kernel="softplus_kernel",
        ptx=later("cp.async.wait_group"),
    ),
    *(
        Fault(f"bar.sync {k} deleted", "softplus_sm80_bf16", kernel="softplus_kernel", ptx=delete("bar.sync", k))
        for k in (1, 2)
    ),
    # ---- additive_scores, Triton
    Fault(
        "columns of another tile",
        "additive_scores",
        SCORES,
        "j = within // height * BLOCK_J",
        "j = within % height * BLOCK_J",
    ),
    Fault(
        "column mask off by one",
        "additive_scores",
        SCORES,
        "mask=(i < n)[:, None] & (j < m)[None, :])",
        "mask=(i < n)[:, None] & (j <= m)[None, :])",
    ),
    Fault(
        "rows of S overlap",
        "additive_scores",
        SCORES,
        "tl.store(out + i.to(tl.int64)[:, None] * m +",
        "tl.store(out + i.to(tl.int64)[:, None] * (m - 1) +",
    ),
    Fault(
        "last features skipped",
        "additive_scores",
        SCORES,
        "for _ in range(0, width_padded, UNROLL)",
        "for _ in range(UNROLL, width_padded, UNROLL)",
    ),
    Fault(
        "transpose with the wrong stride",
        "additive_scores",
        SCORES,
        "[None, :] * rows_padded + i[:, None], g)",
        "[None, :] * m_padded + i[:, None], g)",
    ),
    Fault(
        "gradient read in padded rows",
        "additive_scores",
        SCORES,
        "i.to(tl.int64)[:, None] * m + j[None, :], mask=inside",
        "i.to(tl.int64)[:, None] * m_padded + j[None, :], mask=inside",
    ),
    Fault(
        "gradient past the last column",
        "additive_scores",
        SCORES,
        "inside = (i < rows)[:, None] & (j < m)[None, :]",
        "inside = (i < rows)[:, None] & (j >= 0)[None, :]",
    ),
    Fault("divided by another total", "additive_scores", SCORES, "1.0 + tl.sum(sums, 0)", "2.0 + tl.sum(sums, 0)"),
]
