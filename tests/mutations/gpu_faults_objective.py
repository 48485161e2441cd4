"""Faults of the GPU kernels around critics.  An anchor not found exactly once is an error."""

from __future__ import annotations

from mutations import Fault

GROUP, SUMS = "cibr_kernels/information/triton_group.py", "cibr_kernels/primitives/triton_sums.py"
GAME, STATISTICS = "cibr_kernels/losses/triton_game.py", "cibr_kernels/nn/triton_statistics.py"

FAULTS = [
    # ---- a group of critics
    Fault(
        "row mask of the parameters off by one",
        "critics",
        GROUP,
        "inside = (r < n)[:, None] & (k < width)[None, :]\n    start",
        "inside = (r <= n)[:, None] & (k < width)[None, :]\n    start",
    ),
    Fault("c in the rows of the first critic", "critics", GROUP, "rows = (group * n + r.to(", "rows = (r.to("),
    Fault("w of the first critic overwritten", "critics", GROUP, "ws + group * width + k", "ws + k"),
    Fault("bias of the first critic overwritten", "critics", GROUP, "tl.store(biases + group,", "tl.store(biases,"),
    Fault(
        "w of the first units only",
        "critics",
        GROUP,
        "if tl.program_id(0) == 0:",
        "if tl.program_id(0) + tl.program_id(1) == 0:",
    ),
    Fault(
        "rows of the next critic summed",
        "critics",
        GROUP,
        "inside = (r < n)[:, None] & (k < width)[None, :]\n    here",
        "inside = (r >= 0)[:, None] & (k < width)[None, :]\n    here",
    ),
    Fault("db of the first critic", "critics", GROUP, "tl.load(db + (group * n + r.to(", "tl.load(db + (r.to("),
    Fault(
        "partial sums of another critic overwritten",
        "critics",
        GROUP,
        "(group * tl.num_programs(0) + tl.program_id(0)) * width",
        "(group + tl.program_id(0)) * width",
    ),
    Fault("g_j of the first critic", "critics", GROUP, "tl.load(g_j + group)", "tl.load(g_j)"),
    Fault("bias without the gradient of L", "critics", GROUP, "dbias + group, of_j + of_l)", "dbias + group, of_j)"),
    Fault("last block of c skipped", "critics", SUMS, "inside = (r < blocks)", "inside = (r < blocks - 1)"),
    Fault("c of the first critic overwritten", "critics", SUMS, "    out += group * width\n", ""),
    # ---- the game of encoders against critics
    Fault("noise of standard deviation 1", "game", GAME, "here += noise_std * tl.load", "here += tl.load"),
    Fault(
        "noise past the end",
        "game",
        GAME,
        "inside = at < count\n    here = tl.load(z + at",
        "inside = at <= count\n    here = tl.load(z + at",
    ),
    Fault("Z without its root", "game", GAME, "tl.store(out + at, here * root,", "tl.store(out + at, here,"),
    Fault("own and other swapped", "game", GAME, "nats % 2 == 0", "nats % 2 == 1"),
    Fault("a critic of texts counted twice", "game", GAME, "nats < 2, signed, 0.0)", "nats < 3, signed, 0.0)"),
    Fault("penalty without lam", "game", GAME, "+ tl.load(lam) * (image + text)", "+ (image + text)"),
    Fault("parts overwritten by the estimates", "game", GAME, "parts + 2 + nats", "parts + 1 + nats"),
    Fault(
        "sign of J's gradient", "game", GAME, "tl.zeros((4,), tl.float32) - here", "tl.zeros((4,), tl.float32) + here"
    ),
    Fault("gradient of Z without its root", "game", GAME, "other=0.0) * root * tl", "other=0.0) * tl"),
    Fault("encoders' gradient without lam", "game", GAME, "* root * tl.load(lam)", "* root"),
    Fault(
        "gradient past the end",
        "game",
        GAME,
        "inside = at < count\n    here = tl.load(dz + at",
        "inside = at <= count\n    here = tl.load(dz + at",
    ),
    # ---- standardised data
    Fault(
        "mean of a full block",
        "standardize",
        STATISTICS,
        "tl.minimum(n - block * BLOCK_R, BLOCK_R)",
        "BLOCK_R",
    ),
    Fault(
        "padding among the deviations",
        "standardize",
        STATISTICS,
        "tl.where(inside, here - mean[None, :], 0.0)",
        "here - mean[None, :]",
    ),
    Fault("blocks weighed alike", "standardize", STATISTICS, "* (count / n)[:, None]", "* (ROWS / n)"),
    Fault("blocks' means do not vary", "standardize", STATISTICS, "deviation * count[:, None], 0.0)", "0.0, 0.0)"),
    Fault(
        "means in the place of squares",
        "standardize",
        STATISTICS,
        "tl.load(places + width, mask",
        "tl.load(places, mask",
    ),
    Fault("sum of squares for variance", "standardize", STATISTICS, "var = squares / n", "var = squares"),
    Fault(
        "statistics moved by a NaN elsewhere",
        "standardize",
        STATISTICS,
        "(k < width) & (_strange(bad, count, BLOCK) == 0)",
        "(k < width) & (_strange(bad, count, BLOCK) >= 0)",
    ),
    Fault(
        "only the first flag read",
        "standardize",
        STATISTICS,
        "b = at + tl.arange(0, BLOCK)\n        found += tl.load(bad + b, mask=b < count,",
        "b = at + tl.arange(0, BLOCK)\n        found += tl.load(bad + b, mask=b < 1,",
    ),
    Fault(
        "weight of the old statistics", "standardize", STATISTICS, "!= 0, momentum, 1.0)", "!= 0, 1 - momentum, 1.0)"
    ),
    Fault(
        "started by a NaN", "standardize", STATISTICS, "_strange(bad, count, BLOCK) == 0, 1, was)", "count > 0, 1, was)"
    ),
    Fault(
        "eps left out", "standardize", STATISTICS, "mask=k < width, other=1.0) + eps)", "mask=k < width, other=1.0))"
    ),
    Fault(
        "columns past the end",
        "standardize",
        STATISTICS,
        "at = r.to(tl.int64)[:, None] * width",
        "at = r.to(tl.int64)[:, None] * (width + 1)",
    ),
]
