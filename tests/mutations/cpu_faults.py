"""The faults in the kernels of the CPU.  An anchor not found exactly once is an error: update it with the kernel."""

from __future__ import annotations

from mutations import Fault

ENGINE, PACK, SWEEP = "csrc/dot/engine.h", "csrc/dot/pack.h", "csrc/dot/sweep.h"
LSE, SOFTPLUS = "csrc/dot/lse/cpu.cpp", "csrc/dot/softplus/cpu.cpp"
CLIP, SIGLIP = "csrc/losses/clip/cpu.cpp", "csrc/losses/siglip/cpu.cpp"
PHI, POLYNOMIALS, FACTORS = ("csrc/additive/" + f for f in ("activations.h", "polynomials.h", "separable_exp.h"))
POSITIVES = "csrc/additive/moments/positives.h"
PAIRS, TILES = "csrc/additive/sweep.h", "csrc/additive/tiles.h"
MOMENTS, SCORES, SHIFTS = (f"csrc/additive/{op}/cpu.cpp" for op in ("moments", "scores", "shifts"))
MEAN_EXP = "csrc/log_mean_exp/cpu.cpp"
SIMD, SCRATCH, DTYPE = "csrc/common/simd.h", "csrc/common/scratch.cpp", "csrc/common/dtype.h"

FAULTS = [
    # ---- matrix engine and packing
    Fault("last rows of a tile skipped", "lse", ENGINE, "else if constexpr (ROWS > 2)", "else if constexpr (ROWS > 4)"),
    Fault(
        "each sweep of depth overwrites",
        "lse",
        ENGINE,
        "{c.column(v), c.stride}, add || k0 > 0,",
        "{c.column(v), c.stride}, add,",
    ),
    Fault("a block of columns in the next one's place", "lse", PACK, "out + (rb * out_rows + c)", "out + (r0 + c)"),
    Fault(
        "columns past the width read",
        "softplus",
        PACK,
        "m.first + r >= m.total ? 0 : left < kBlock ? left : kBlock;",
        "m.first + r >= m.total ? 0 : kBlock;",
    ),
    # ---- sweep over pairs
    Fault("limits of scores without their scale", "lse", SWEEP, "select(l * scale > limit,", "select(l > limit,"),
    Fault("gradients above a limit", "lse", LSE, "if (p.row_limits) mask_above(p.row_limits, p.scale, t, s);", ""),
    Fault(
        "padding rows take part",
        "softplus",
        SWEEP,
        "for (int64_t r = t.rows; r < t.padded_rows; r++)",
        "for (int64_t r = t.rows; r < t.rows; r++)",
    ),
    Fault(
        "padding columns take part", "lse", SWEEP, "int64_t c = p.m - t.first_col; c < kBlock", "int64_t c = 0; c < 0"
    ),
    Fault(
        "positives one column late",
        "lse",
        SWEEP,
        "p.first_positive - t.first_row;",
        "p.first_positive - t.first_row + 1;",
    ),
    Fault("last positive of a tile missed", "lse", SWEEP, "r < 0 || r >= t.rows)", "r < 0 || r >= t.rows - 1)"),
    Fault("groups of the first panel's rows", "lse", SWEEP, "p.row_ids[t.first_row + r];", "p.row_ids[r];"),
    Fault("bound without the last features", "lse", SWEEP, "for (; c < cols; c++) tail +=", "for (; 0; c++) tail +="),
    Fault(
        "dX of the last chunk alone",
        "lse",
        SWEEP,
        "{dxp.data + (db * rows + r) * kBlock, rows * kBlock}, b0 > 0);",
        "{dxp.data + (db * rows + r) * kBlock, rows * kBlock}, false);",
    ),
    Fault(
        "dY of the last panel alone",
        "lse",
        SWEEP,
        "{dyt.data + b * dp * kBlock, dp * kBlock}, i0 > 0,",
        "{dyt.data + b * dp * kBlock, dp * kBlock}, false,",
    ),
    Fault(
        "positive missing in a row's last features",
        "lse",
        SWEEP,
        "sums[c] + (positive ? weight * to_float(positive[c0 + c]) : 0);",
        "sums[c];",
    ),
    Fault("dscale of whole eights alone", "softplus", SWEEP, "lanes[c % 8] +=", "lanes[c % 8] += 0 *"),
    Fault(
        "row sums of the first panel", "softplus", SWEEP, "epilogue.add_row(i0 + r, sum);", "epilogue.add_row(r, sum);"
    ),
    # ---- dot_lse
    Fault("largest score of some columns alone", "lse", LSE, "top[v] = vmax(top[v], l[v]);", "top[v] = l[v];"),
    Fault("sums merged without rescaling", "lse", LSE, "*sum = *sum * factor + other_sum;", "*sum = *sum + other_sum;"),
    Fault("a lower maximum counts as the higher", "lse", LSE, "sum[r] * ::exp(m - next);", "sum[r];"),
    Fault(
        "a column's underflow not seen",
        "lse",
        LSE,
        "if (p.col_lse[j] < shift - kUnderflow && left_out < p.n) return true;",
        "(void)left_out;",
    ),
    Fault(
        "an empty row counts as underflow", "lse", LSE, "shift - kUnderflow && left_out < p.m)", "shift - kUnderflow)"
    ),
    Fault("stash of the first panel's rows", "lse", LSE, "block + t.first_row * kBlock;", "block;"),
    Fault(
        "backward without the shift",
        "lse",
        LSE,
        "u.data[i] *= ::expf(shift - rows.data[i]);",
        "u.data[i] *= ::expf(-rows.data[i]);",
    ),
    Fault("columns' part of the online gradient", "lse", LSE, "if (w.col_lse) x +=", "if (w.col_lse) x ="),
    # ---- dot_softplus and the losses made at once
    Fault(
        "gradient of attracting pairs keeps its sign",
        "softplus",
        SOFTPLUS,
        "select(same[n], -g, g)",
        "select(same[n], g, g)",
    ),
    Fault("row weights of the first panel", "softplus", SOFTPLUS, "return t.first_row + (r <", "return (r <"),
    Fault(
        "dbias without the last block",
        "softplus",
        SOFTPLUS,
        "for (int64_t b = 0; b < mp / kBlock;",
        "for (int64_t b = 0; b < mp / kBlock - 1;",
    ),
    Fault("mean over rows where both ways count", "clip", CLIP, "(both ? 2 * n : n)", "n"),
    Fault(
        "positives' gradient of one way",
        "clip",
        CLIP,
        "positive_grad[i] -= gradients[i];",
        "positive_grad[i] = -gradients[i];",
    ),
    Fault(
        "last features of the positives skipped",
        "siglip",
        SIGLIP,
        "for (; c < p.d; c++) dot +=",
        "for (; 0; c++) dot +=",
    ),
    Fault(
        "dbias of the positives alone",
        "siglip",
        SIGLIP,
        "static_cast<float>(dbias + sum_dbias)",
        "static_cast<float>(dbias)",
    ),
    # ---- activations
    Fault("softplus: a coefficient off by 1e-4", "shifts", PHI, "square + 0.666664131f", "square + 0.666764131f"),
    Fault("exponential: ln 2 in one part", "shifts", PHI, "r = k * 2.12194440e-4f + r;", "r = r + 0.0f;"),
    Fault(
        "elu: slope without alpha",
        "scores",
        PHI,
        "where_positive(t, 1.0f, alpha * e.value)",
        "where_positive(t, 1.0f, e.value)",
    ),
    Fault(
        "gelu: tail of the wrong side",
        "scores",
        PHI,
        "where_positive(t, 1.0f - tail, tail)",
        "where_positive(t, 1.0f - tail, 1.0f - tail)",
    ),
    Fault("silu: no bound on its exponential", "scores", PHI, "const V x = at_least(t, -87.0f);", "const V x = t;"),
    Fault(
        "product without its low part",
        "scores",
        FACTORS,
        "(a_low * b_high + (a_high * b_high - c))",
        "(a_high * b_high - c)",
    ),
    Fault("low parts never made", "scores", FACTORS, "low[n] = static_cast<float>(value - high[n]);", "low[n] = 0.0f;"),
    Fault("tanh: a rough quotient", "scores_avx512", FACTORS, "(less - rough * more) * r + rough;", "rough;"),
    Fault("reciprocal not refined", "scores_avx512", PHI, "return r + r * (1.0f - x * r);", "return r;"),
    Fault(
        "gelu: a coefficient of one piece", "scores_avx512", POLYNOMIALS, "0.5f, 0.646541476f,", "0.5f, 0.646542476f,"
    ),
    Fault(
        "softplus: a logarithm of the table",
        "scores_avx512",
        POLYNOMIALS,
        "0.015504186f, 0.0458095595f,",
        "0.015504186f, 0.0458105595f,",
    ),
    # ---- pairs of the additive critic
    Fault(
        "leaky ReLU: slope below 0 counted twice",
        "moments",
        PAIRS,
        "w.data[k] = (1.0f - below) * weights[k];",
        "w.data[k] = weights[k];",
    ),
    Fault(
        "columns past the end take part",
        "moments",
        PAIRS,
        "shift[x] = x % COLS < count && x < ROWS * COLS ? 0.0f : NOTHING;",
        "shift[x] = 0.0f;",
    ),
    Fault(
        "factors of b's range unchecked",
        "scores",
        PAIRS,
        "outside += !(right.low[k] - centre > -span && right.high[k] - centre < span);",
        "",
    ),
    Fault("last units of a column not copied", "scores", PAIRS, "if (k < h) memcpy(", "if (false) memcpy("),
    Fault("groups merged in units of their own", "moments", PAIRS, "x[k] += factor[g] * part[k];", "x[k] += part[k];"),
    Fault(
        "ReLU not flat at 0",
        "scores",
        TILES,
        "inline mask greater(vi x, vi y) { return x > y; }",
        "inline mask greater(vi x, vi y) { return x >= y; }",
    ),
    Fault(
        "weights of the first chunk of units",
        "scores",
        TILES,
        "panel.negative + k0 * COLS + column, w + k0,",
        "panel.negative + k0 * COLS + column, w,",
    ),
    Fault("-0 is less than 0", "moments", TILES, "reinterpret_cast<vi>(x + 0.0f)", "reinterpret_cast<vi>(x)"),
    Fault("negative numbers in the other order", "scores", TILES, "bits ^ (bits >> 31 & 0x7fffffff)", "bits"),
    Fault(
        "last units of a row not added",
        "scores",
        TILES,
        "k < smaller(RUN, h - k0); k++) x[",
        "k < RUN && k0 + RUN <= h; k++) x[",
    ),
    # ---- additive_moments, additive_scores, additive_shifts
    Fault("a tile's rows keep the old shift", "moments", MOMENTS, "scale(t.da, ROWS * width, factor);", ""),
    Fault("masses keep the old shift", "moments", MOMENTS, "scale(t.mass, MASSES, factor);", ""),
    Fault("positives counted among the pairs", "moments", MOMENTS, "(p.include_diagonal ? 0 : p.n)", "0"),
    Fault(
        "every block in the first one's units", "moments", MOMENTS, "block_shift.data[j / block]", "block_shift.data[0]"
    ),
    Fault(
        "positives of the same row number",
        "moments",
        POSITIVES,
        "(group * p.m + p.first_positive + i) * p.h",
        "(group * p.m + i) * p.h",
    ),
    Fault(
        "dw of the first block of rows",
        "moments",
        POSITIVES,
        "total += sum.data[(group * blocks + block) * width + k];",
        "total += block ? 0.0f : sum.data[group * blocks * width + k];",
    ),
    Fault(
        "columns that are no positive left out",
        "moments",
        POSITIVES,
        "if (!p.db || (j >= p.first_positive && j < p.first_positive + p.n)) return;",
        "return;",
    ),
    Fault(
        "groups by the number of threads",
        "scores",
        SCORES,
        "groups(count_groups(p.n, ROWS,",
        "groups(p.threads > 1 ? 1 : count_groups(p.n, ROWS,",
    ),
    Fault(
        "dw of the first group",
        "scores",
        SCORES,
        "group_dw.data[g * width + k] += t.dw[k];",
        "group_dw.data[k] = t.dw[k];",
    ),
    Fault(
        "partners wrap at n",
        "shifts",
        SHIFTS,
        "other = other == 0 ? p.m - 1 : other - 1;",
        "other = other == 0 ? p.n - 1 : other - 1;",
    ),
    Fault(
        "what is not finite in a row of b is lost",
        "shifts",
        SHIFTS,
        "taint_a.data[i] + taint_b.data[j];",
        "taint_a.data[i];",
    ),
    Fault("a gradient that is not finite is lost", "shifts", SHIFTS, ".data[met] + g * 0.0f;", ".data[met];"),
    # ---- log_mean_exp
    Fault(
        "pieces of another maximum",
        "log_mean_exp",
        MEAN_EXP,
        "(tops.data[k] == top ? 1 : ::exp(tops.data[k] - top))",
        "1",
    ),
    Fault("mean over masked scores too", "log_mean_exp", MEAN_EXP, "::log(p.mask ? pairs : p.count)", "::log(p.count)"),
    Fault("masked scores read", "log_mean_exp", MEAN_EXP, "if (!p.mask || p.mask[i + k]) v[k]", "v[k]"),
    # ---- what they share
    Fault(
        "a power of two below the range",
        "lse",
        SIMD,
        "return x < lo ? vf{} : reinterpret_cast<vf>(power);",
        "return reinterpret_cast<vf>(power);",
    ),
    Fault(
        "a sum of all lanes but half",
        "softplus",
        SIMD,
        "for (int width = VL / 2; width > 0; width /= 2)\n    for (int i = 0; i < width; i++) lane[i] += ",
        "for (int width = VL / 2; width > 1; width /= 2)\n    for (int i = 0; i < width; i++) lane[i] += ",
    ),
    Fault(
        "bfloat16 rounded down",
        "moments",
        DTYPE,
        "static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)",
        "static_cast<uint16_t>(u >> 16)",
    ),
    Fault("scratch given to two", "lse", SCRATCH, "return remove(best) + 1;", "return kept[best] + 1;"),
    Fault(
        "scratch too small for who asks",
        "lse",
        SCRATCH,
        "kept[i]->size >= size && kept[i]->size <= 2 * size + 4096",
        "kept[i]->size <= 2 * size + 4096",
    ),
    Fault(
        "scratch of the first thread for all",
        "scores",
        PAIRS,
        "omp_get_thread_num() * scratch_size",
        "0 * scratch_size",
    ),
]
