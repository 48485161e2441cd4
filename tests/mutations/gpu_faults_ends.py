"""Faults of the GPU kernels of losses' O(n) ends and of log_mean_exp.  An anchor not found exactly once is an error."""

from __future__ import annotations

from mutations import Fault

CLIP = "cibr_kernels/losses/clip/triton_kernels.py"
SIGLIP = "cibr_kernels/primitives/dot/softplus/triton_kernels.py"
MEAN = "cibr_kernels/primitives/log_mean_exp/triton_kernels.py"

FAULTS = [
    # ---- clip_loss
    Fault("loss without its share", "clip_loss", CLIP, "tl.sum(loss, 0) * share", "tl.sum(loss, 0)"),
    Fault("softplus without its linear part", "clip_loss", CLIP, "tl.maximum(t, 0.0) + log1p", "log1p"),
    Fault(
        "padding in the loss", "clip_loss", CLIP, "tl.where(inside, tl.maximum(t,", "tl.where(at >= 0, tl.maximum(t,"
    ),
    Fault("sigmoid of the other sign", "clip_loss", CLIP, "tl.where(t > 0.0, 1.0, u)", "tl.where(t > 0.0, u, 1.0)"),
    Fault("sign of the positives' gradient", "clip_loss", CLIP, "g_positives + at, -slope", "g_positives + at, slope"),
    Fault("positives without the columns", "clip_loss", CLIP, "        slope += col_slope\n", ""),
    Fault("columns' loss missing", "clip_loss", CLIP, "        loss += col_loss\n", ""),
    Fault("exponent not written", "clip_loss", CLIP, "            tl.store(exponent, 0.0)\n", ""),
    Fault(
        "a shift where there is none",
        "clip_loss_online",
        CLIP,
        'tl.where(state == FIXED, shift_log2 * LN2, float("nan"))',
        "shift_log2 * LN2",
    ),
    Fault("sums of the fixed mode", "clip_loss_online", CLIP, "if FOLD and state != FIXED:", "if FOLD and state == 7:"),
    Fault(
        "first tile of the rows only",
        "clip_loss_online",
        CLIP,
        "tl.where(refused, 0, col_tiles)",
        "tl.where(refused, 0, 1)",
    ),
    Fault("rows past the end", "clip_loss_panels", CLIP, "inside = at < n", "inside = at <= n"),
    Fault("losses of another block", "clip_loss_panels", CLIP, "tl.store(losses + pid,", "tl.store(losses,"),
    # ---- siglip_loss
    Fault(
        "positives of the next row", "siglip_loss", SIGLIP, "b = tl.load(y + i.to(", "b = tl.load(y + (n - 1 - i).to("
    ),
    Fault(
        "bias left out of the positives",
        "siglip_loss",
        SIGLIP,
        "* tl.load(scale) + tl.load(bias)\n",
        "* tl.load(scale)\n",
    ),
    Fault(
        "sign of the positives' slope",
        "siglip_loss",
        SIGLIP,
        "-share * tl.where(t > 0.0, u, 1.0)",
        "share * tl.where(t > 0.0, u, 1.0)",
    ),
    Fault("sigmoid of the other sign", "siglip_loss", SIGLIP, "tl.where(t > 0.0, u, 1.0)", "tl.where(t > 0.0, 1.0, u)"),
    Fault(
        "positives attract the wrong way",
        "siglip_loss",
        SIGLIP,
        "t = -tl.load(positives + at",
        "t = tl.load(positives + at",
    ),
    Fault(
        "padding in the loss",
        "siglip_loss",
        SIGLIP,
        "total = tl.where(inside, tl.maximum",
        "total = tl.where(at >= 0, tl.maximum",
    ),
    Fault(
        "tiles of another row",
        "siglip_loss",
        SIGLIP,
        "tile.to(tl.int64)[:, None] * rows + at",
        "tile.to(tl.int64)[:, None] * tiles + at",
    ),
    Fault(
        "last tile skipped",
        "siglip_loss",
        SIGLIP,
        "mask = (tile < tiles)[:, None] & inside",
        "mask = (tile < tiles - 1)[:, None] & inside",
    ),
    Fault(
        "dbias without the positives",
        "siglip_loss",
        SIGLIP,
        "tl.sum(tl.load(g_positives + at, mask=inside, other=0.0), 0)",
        "0.0",
    ),
    Fault("dscale without upstream's gradient", "siglip_loss", SIGLIP, "tl.load(dscale) * upstream", "tl.load(dscale)"),
    Fault("dx in the place of dy", "siglip_loss", SIGLIP, "tl.load(dy + at,", "tl.load(dx + at,"),
    Fault(
        "gradients past the end",
        "siglip_loss",
        SIGLIP,
        "tl.load(dx + at, mask=at < x_count",
        "tl.load(dx + at, mask=at <= x_count",
    ),
    # ---- log_mean_exp
    Fault(
        "pairs that take no part", "log_mean_exp", MEAN, "mask=inside, other=0) != 0)", "mask=inside, other=0) >= 0)"
    ),
    Fault("scores past the end", "log_mean_exp", MEAN, "inside = at < count\n", "inside = at <= count\n"),
    Fault(
        "a full last piece counted",
        "log_mean_exp",
        MEAN,
        "tl.minimum(count - piece.to(tl.int64) * PIECE, PIECE).to(tl.int32)",
        "PIECE",
    ),
    Fault("no shift of an empty piece", "log_mean_exp", MEAN, 'tl.where(tl.abs(top) == float("inf"), 0.0, top)', "top"),
    Fault("missing rescale between pieces", "log_mean_exp", MEAN, "total += mass * factor", "total += mass"),
    Fault(
        "maxima of the last block",
        "log_mean_exp",
        MEAN,
        "highest = tl.maximum(highest, tl.load(",
        'highest = tl.maximum(tl.full((BLOCK,), float("-inf"), tl.float32), tl.load(',
    ),
    Fault(
        "last piece not counted",
        "log_mean_exp",
        MEAN,
        "counted += tl.load(pairs + first + lane, mask=inside",
        "counted += tl.load(pairs + first + lane, mask=first + lane < number - 1",
    ),
    Fault(
        "gradient not divided by the pairs",
        "log_mean_exp",
        MEAN,
        "(tl.load(grad).to(tl.float32) / number)",
        "tl.load(grad).to(tl.float32)",
    ),
    Fault("gradient of a piece's sum", "log_mean_exp", MEAN, "tl.exp(s - tl.load(el))", "tl.exp(s)"),
]
