"""Symmetric InfoNCE (the CLIP loss) whose n x n logits are never stored in full.

    l_ij = scale * <x_i, y_j>                          positives p_i = l_i,first_positive+i
    R_i  = log sum_{j != pos} exp l_ij                 C_j the same over rows: `dot_lse`
    loss = 1/2n sum_i [softplus(R_i - p_i) + softplus(C_i - p_i)]         (one_way: 1/n, rows only)

softplus(R - p) is LSE - p with the positive inside the LSE: the same number, whose value and gradient keep their digits
when the loss is tiny.  Everything here is O(n d); the passes over all pairs are `dot_lse`'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cibr_kernels import checks
from cibr_kernels.dispatch import library
from cibr_kernels.distributed.lse import STRATEGIES
from cibr_kernels.distributed.shards import Agreement, Shards
from cibr_kernels.losses import targets
from cibr_kernels.losses.clip.denominators import pair_losses
from cibr_kernels.losses.clip.directions import Problem
from cibr_kernels.losses.clip.fast_path import known_loss, plain_loss
from cibr_kernels.losses.clip.options import Negatives, SoftTargets


def clip_loss(
    image_features: Tensor,  # (n, d)
    text_features: Tensor,  # (n, d)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    group_ids: Tensor | None = None,
    group_mode: str = "mask",
    image_negatives: Tensor | None = None,
    text_negatives: Tensor | None = None,
    negatives: Negatives | None = None,
    soft_targets: SoftTargets | None = None,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    one_way: bool = False,
    return_metrics: bool = False,
    process_group: ProcessGroup | Shards | None = None,
    strategy: str = "gather",
    backend: str = "auto",
) -> Any:
    """The CLIP loss in nats, a float32 scalar unless `reduction` is "none"; differentiable in all tensors.

    Equal to `(cross_entropy(l, arange(n)) + cross_entropy(l.T, arange(n))) / 2` with
    `l = logit_scale * image_features @ text_features.T + logit_bias`, with logits and sums in float32 for every dtype.

    Args:
        image_features: (n, d) float32, bfloat16 or float16 (float64 runs the reference); usually of unit norm.
        text_features: (n, d), same dtype and device; row i belongs to row i of `image_features`.
        logit_scale: exp(log_scale) = 1 / temperature, a positive number or a one-element tensor; or (n,), one per pair,
            that of the anchor in either direction (two passes over one-way logits instead of one, in float32; a shard
            of a single row cannot tell them apart and refuses).
        logit_bias: accepted for open_clip's signature; softmax ignores a constant, so its gradient is zero.
        group_ids: (n,) integers; pairs of one group (a caption twice, two photos of one product) are no negatives.
        group_mode: "mask" leaves pairs of one group out of the denominator; "positives" counts all texts of an image's
            group as its positives, with equal shares of the target (SupCon, 2004.11362, equation 2).
        image_negatives, text_negatives: (k, d), more candidates that are nobody's positive, of the text -> image and of
            the image -> text direction: a queue (MoCo) or hard negatives.  On several ranks, of this rank's rows.
        negatives: `cibr_kernels.Negatives`: same-side negatives, each anchor's own hard negatives, one softmax over
            several directions, weights by hardness.  Not with one_way (it is a choice of directions), group_mode
            "positives", label_smoothing, soft_targets or return_metrics.
        soft_targets: `cibr_kernels.SoftTargets`: near duplicates share the target, by the similarity of a guide's
            features; O(n d) memory.  Not with group_ids or label_smoothing.
        label_smoothing: in [0, 1): that share of the target is spread evenly over an anchor's candidates.
        weights: (n,) weights of the pairs, not negative.
        reduction: "mean" (by weight), "sum", or "none" for (n,) losses, the mean of a pair's two directions.
        one_way: only image -> text, equation 3 of CIBR (2503.24182).
        return_metrics: also return {"image_to_text_top1", "text_to_image_top1", "positive_logit", "negative_logit"},
            0-d, without gradient, of the same pass: how often the positive is above all that the denominator sums, and
            the mean logits of the positives and of all other pairs.
        process_group: ranks whose rows make one batch, such as `dist.group.WORLD` (None before torch.distributed is
            initialised: one process).  Features are this rank's rows, shards may be uneven.  The mean of the returned
            losses over ranks is the loss of the whole batch, and gradients that DDP or FSDP average are its gradients,
            logit_scale's included: `cibr_kernels.distributed`.  With "none" each rank gets its own rows' losses.
        strategy: "gather" brings the texts of all ranks to every rank, O(total d) memory; "ring" passes them on, in
            O(n d), and computes the logits twice; not with extra negatives or group_mode "positives".
        backend: "auto", "native" (C++, CPU), "triton" (GPU) or "reference" (plain PyTorch, stores the n x n logits).

    Raises:
        TypeError, ValueError: dtype, device or shape mismatch, empty input, non-positive scale (checked on the CPU),
            unknown names; ranks that disagree on width, dtype, device or options: on every rank, before any work.
        RuntimeError: the named backend cannot run here (every reason is given), a double backward, a rank that died.

    NaN or infinity in the features gives a NaN loss.  Under autocast the features are cast as a matmul would cast them.
    Source: Radford et al. 2021 (2103.00020), Figure 3.
    """
    if strategy not in STRATEGIES:
        checks.choice("strategy", strategy, STRATEGIES)
    if reduction not in targets.REDUCTIONS:
        checks.choice("reduction", reduction, targets.REDUCTIONS)
    if group_mode not in targets.GROUP_MODES:
        checks.choice("group_mode", group_mode, targets.GROUP_MODES)
    candidates = image_negatives is text_negatives is negatives is None
    plain = candidates and group_ids is soft_targets is weights is process_group is None and reduction == "mean"
    plain = plain and not (label_smoothing or return_metrics)
    if plain and backend != "reference" and library.only_autograd_looks_on(image_features, text_features, logit_scale):
        if logit_bias is None and isinstance(image_features, Tensor) and image_features.is_cuda:
            loss = known_loss(image_features, text_features, logit_scale, one_way, backend)
            if loss is not None:
                return loss
        x, y, scale, bias = _inputs(image_features, text_features, logit_scale, logit_bias)
        if not scale.dim():
            loss = plain_loss(x, y, scale, one_way, backend)
            return loss if bias is None else loss + 0.0 * bias
    options = {
        "one_way": one_way,
        "strategy": strategy,
        "group_ids": group_ids is not None and group_mode,
        "image_negatives": image_negatives is not None,
        "text_negatives": text_negatives is not None,
        "label_smoothing": label_smoothing,
        "weights": weights is not None,
        "reduction": reduction,
        "return_metrics": return_metrics,
        "negatives": negatives and negatives.options(),
        "soft_targets": soft_targets and soft_targets.options(),
    }
    with Agreement("clip_loss", process_group, **options) as agreement:
        x, y, scale, bias = _inputs(image_features, text_features, logit_scale, logit_bias)
        ids, weights = targets.check_ids(group_ids, x), targets.check_weights(weights, x)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        problem = Problem(
            image=x,
            text=y,
            scale=scale,
            image_negatives=targets.check_negatives("image_negatives", image_negatives, x),
            text_negatives=targets.check_negatives("text_negatives", text_negatives, x),
            groups=None,
            several_positives=ids is not None and group_mode == "positives",
            label_smoothing=label_smoothing,
            soft_targets=None if soft_targets is None else soft_targets.checked(x),
            one_way=one_way,
            metrics=return_metrics,
            shards=None,
            strategy=strategy,
            backend=backend,
        )
        _refuse_combinations(problem, negatives, ids is not None)
        if negatives is not None:
            negatives = negatives.checked(x)
            problem = replace(problem, one_way=negatives.one_way)
        if problem.one_way and image_negatives is not None:
            raise ValueError("image_negatives are candidates of text -> image, the direction that one_way leaves out")
        if process_group is not None or (scale.dim() and not torch.compiler.is_compiling()):
            checks.positive("logit_scale", scale)  # dot_lse refuses one number too, while other ranks wait for this one
        agreement.options["number of logit_scales"] = "one per pair" if scale.dim() else "one"
        agreement.describe(image_features=x, text_features=y)
    shards = agreement.shards
    if shards is not None or ids is not None:
        problem = replace(problem, shards=shards, groups=targets.Groups.of(ids, shards))
    if negatives is not None:
        pairs = pair_losses(problem, negatives)
    else:
        ways, positives = problem.directions()
        losses = [problem.losses(way, positives) for way in ways]
        pairs = losses[0] if one_way else (losses[0] + losses[1]) / 2
    loss = targets.reduce(pairs, weights, reduction, shards)
    loss = loss if bias is None else loss + 0.0 * bias
    return (loss, problem.measure(ways, positives, bias)) if return_metrics else loss


def _refuse_combinations(problem: Problem, negatives: Negatives | None, grouped: bool) -> None:
    """Raises ValueError for options that do not go together.  grouped: there are group_ids."""
    p, ring = problem, problem.strategy == "ring"
    if negatives is not None:
        others = {
            "one_way": p.one_way,
            "group_mode 'positives'": p.several_positives,
            "label_smoothing": p.label_smoothing,
            "soft_targets": p.soft_targets is not None,
            "return_metrics": p.metrics,
        }
        targets.refuse_together("negatives", others)
        if ring and negatives.margin is not None:
            raise ValueError(
                "strategy 'ring' has no margin of Negatives: where shards are uneven its blocks exchange rows and "
                "columns, and only rows have limits; use 'gather'"
            )
    if p.soft_targets is not None:
        others = {"group_ids": grouped, "label_smoothing": p.label_smoothing, "strategy 'ring'": ring}
        targets.refuse_together("soft_targets", others)
    if ring and (p.several_positives or p.image_negatives is not None or p.text_negatives is not None):
        raise ValueError("strategy 'ring' has no extra negatives and no group_mode 'positives'; use 'gather'")


def _inputs(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Checked -> x (n, d), y (n, d), scale () or (n,), bias ()."""
    x, y = targets.check_features(image_features, text_features)
    scale = checks.scalar_or_rows("logit_scale", logit_scale, x)
    return x, y, scale, None if logit_bias is None else checks.scalar("logit_bias", logit_bias, x)
