"""Faults of the GPU kernels of additive critics.  An anchor not found exactly once is an error."""

from __future__ import annotations

from mutations import Fault

ADDITIVE, CUDA = "cibr_kernels/primitives/additive/moments/", "csrc/additive/moments/"
KERNELS, LAUNCHER = ADDITIVE + "triton_kernels.py", ADDITIVE + "triton.py"
POSITIVES = ADDITIVE + "triton_positives.py"
SHIFTS = "cibr_kernels/primitives/additive/shifts/triton_kernels.py"
SCORES = "cibr_kernels/primitives/additive/scores/triton_kernels.py"

FAULTS = [
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
        "positives without the first_positive",
        "additive",
        KERNELS,
        "positive = (i + first_positive)[:, None]",
        "positive = i[:, None]",
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
    Fault("weights missing from da and db", "additive", KERNELS, "(total * tl.load(w_packed + k)[None, :])", "total"),
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
        "pairs = self.n * self.m - (0 if self.problem.include_diagonal else self.n)",
        "pairs = self.n * self.m",
    ),
    Fault(
        "sum of exponentials in bf16",
        "additive",
        KERNELS,
        "tl.sum(tl.exp(acc - shift), 1)",
        "tl.sum(tl.exp(acc - shift).to(tl.bfloat16), 1).to(tl.float32)",
    ),
    Fault("positives of the same row number", "additive", POSITIVES, "i = j - first_positive", "i = j"),
    Fault(
        "rows of b without a positive left out",
        "additive",
        POSITIVES,
        "mask=inside)\n    if NEED_W",
        "mask=positive)\n    if NEED_W",
    ),
    Fault(
        "positives without their weight",
        "additive",
        POSITIVES,
        "derivative * weight[None, :], 0.0)",
        "derivative, 0.0)",
    ),
    Fault(
        "J's gradient not divided by the rows",
        "additive",
        POSITIVES,
        "/ n if HAS_J else 0.0\n    of_l = tl.load(g_l + group) if HAS_L else 0.0\n    weight",
        "if HAS_J else 0.0\n    of_l = tl.load(g_l + group) if HAS_L else 0.0\n    weight",
    ),
    Fault("phi of the padding", "additive", POSITIVES, "tl.where(positive, value, 0.0)", "value"),
    Fault(
        "last block of dw skipped",
        "additive",
        POSITIVES,
        "inside = (r < blocks)[:, None]",
        "inside = (r < blocks - 1)[:, None]",
    ),
    # ---- groups of critics
    Fault("w of the first critic", "additive_group", POSITIVES, "tl.load(w + group * width + k", "tl.load(w + k"),
    Fault(
        "g_l of the first critic",
        "additive_group",
        POSITIVES,
        "tl.load(g_l + group) if HAS_L else 0.0\n    weight",
        "tl.load(g_l) if HAS_L else 0.0\n    weight",
    ),
    Fault(
        "scores of the first critic overwritten",
        "additive_group",
        KERNELS,
        "tl.store(s + member * s_group + local",
        "tl.store(s + local",
    ),
    Fault("positives of the first critic overwritten", "additive_group", KERNELS, "    positives += member * n\n", ""),
    Fault("sums of exponentials of the first critic", "additive_group", KERNELS, "    e += group * s_group\n", ""),
    Fault(
        "running sums of the first critic",
        "additive_group",
        KERNELS,
        "    s_transposed += group * s_group\n    run += group * 2 * (panels + 1)\n",
        "    s_transposed += group * s_group\n",
    ),
    Fault(
        "weights of the first critic",
        "additive_group",
        KERNELS,
        "    uw += group * uw_rows * width\n    run",
        "    run",
    ),
    # ---- additive_moments, CUDA
    Fault(
        "positives of the same row number", "additive_cuda", CUDA + "positives.cuh", "i = j - first_positive", "i = j"
    ),
    Fault(
        "positives of a chunk's last rows left out",
        "additive_cuda",
        CUDA + "positives.cuh",
        "last = end < m ? end : m;",
        "last = end < m ? end - 1 : m;",
    ),
    Fault(
        "column terms of the first critic", "additive_cuda_group", CUDA + "scores.cuh", "column_term += group * m, ", ""
    ),
    Fault(
        "scores of the first critic",
        "additive_cuda_group",
        CUDA + "gradients.cuh",
        "scores += member * scores_of_group, ",
        "",
    ),
    Fault(
        "range of the first critic",
        "additive_cuda_group",
        CUDA + "prologue_epilogue.cuh",
        "load_as_float(x, dtype, (row0 + row) * h + unit)",
        "load_as_float(x, dtype, row * h + unit)",
    ),
    Fault(
        "g_j of the first critic",
        "additive_cuda_group",
        CUDA + "positives.cuh",
        "return g ? g[group] : 0.0f;",
        "return g ? g[0] : 0.0f;",
    ),
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
        "column == global_row + first_positive",
        "column == row + first_positive",
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
    # ---- additive_shifts, Triton
    Fault("partners past the end", "additive_shifts", SHIFTS, "(i + (first + r) % m) % m", "(i + (first + r) % m)"),
    Fault(
        "scores of another shift", "additive_shifts", SHIFTS, "out + r.to(tl.int64) * n + i", "out + r.to(tl.int64) + i"
    ),
    Fault(
        "last features skipped",
        "additive_shifts",
        SHIFTS,
        "in range(0, width, BLOCK_H)",
        "in range(0, width - BLOCK_H, BLOCK_H)",
    ),
    Fault(
        "rows of b that meet none",
        "additive_shifts",
        SHIFTS,
        "(own < rows) & (other < others)",
        "(own < rows) & (other >= 0)",
    ),
    Fault(
        "shifts of b the other way", "additive_shifts", SHIFTS, "(own + (m - by)) % m if OF_B", "(own + by) % m if OF_B"
    ),
    Fault("gradient of b's own row", "additive_shifts", SHIFTS, "(other if OF_B else own)", "own"),
    Fault(
        "padding rows not masked",
        "additive_shifts",
        SHIFTS,
        "inside = (own < rows)[:, None]",
        "inside = (own >= 0)[:, None]",
    ),
    Fault(
        "w missing from da and db",
        "additive_shifts",
        SHIFTS,
        "        acc *= tl.load(w + k, mask=k < width, other=0.0).to(tl.float32)[None, :]\n",
        "",
    ),
    Fault("dw without the gradient", "additive_shifts", SHIFTS, "g[:, None] * value", "value"),
]
