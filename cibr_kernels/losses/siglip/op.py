"""The pairwise sigmoid loss (SigLIP), whose n x n logits are never stored.

    l_ij = scale <x_i, y_j> + bias
    loss = 1/n [ sum_i softplus(-l_ii) + sum_{i != j} softplus(l_ij) ]

The second sum is `dot_softplus`, which makes its gradients in the same pass: 1 matmul pass where no gradient is needed,
else 3.  The positives and everything else are O(n d).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from cibr_kernels import checks
from cibr_kernels.dispatch import backends, library
from cibr_kernels.distributed import merge
from cibr_kernels.distributed.lse import STRATEGIES
from cibr_kernels.distributed.shards import Agreement, Shards
from cibr_kernels.distributed.softplus import sharded_dot_softplus, sharded_dot_softplus_sums
from cibr_kernels.losses import targets
from cibr_kernels.losses.clip.options import Negatives
from cibr_kernels.losses.siglip import negatives as more_pairs
from cibr_kernels.losses.siglip.fast_path import known_loss, plain_loss
from cibr_kernels.numerics import promote, softplus
from cibr_kernels.primitives.dot.softplus.op import dot_softplus, dot_softplus_sums


def siglip_loss(
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
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_metrics: bool = False,
    process_group: ProcessGroup | Shards | None = None,
    strategy: str = "gather",
    backend: str = "auto",
) -> Any:
    """The sigmoid loss in nats per pair, a float32 scalar unless `reduction` is "none"; differentiable in all tensors.

    Equal to `-logsigmoid(labels * l).sum() / n` with `l = logit_scale * image_features @ text_features.T + logit_bias`
    and labels 1 on the diagonal and -1 elsewhere, with logits and sums in float32 for every dtype.

    Args:
        image_features, text_features: (n, d) float32, bfloat16 or float16 (float64 runs the reference), row i of one
            with row i of the other; usually of unit norm.
        logit_scale: exp(log_scale), a positive number or a one-element tensor; SigLIP starts at 10.
        logit_bias: a number or a one-element tensor, learnable; SigLIP starts at -10; None is 0.
        group_ids: (n,) integers; pairs of one group are no negatives.
        group_mode: "mask" leaves pairs of one group out; "positives" counts them as positives.
        image_negatives, text_negatives: (k, d), more negatives of each text, of each image; of this rank's rows.
        negatives: `cibr_kernels.Negatives`: pairs of one side (images with images, texts with texts) and each anchor's
            own hard negatives, as pairs with the label -1, each once.  Not with joint, hardness, margin, fewer than the
            two directions between the sides, or group_mode "positives".
        weights: (n,) weights of the pairs, not negative; pair (i, j) has the mean of the weights of i and j.
        reduction: "mean" (by weight), "sum", or "none" for (n,) losses, loss_i half the sum of row i and column i (its
            backward computes the logits again: 1 + 3 passes).
        return_metrics: also return {"positive_logit", "negative_logit"}, 0-d means without gradient, O(n d).
        process_group, strategy, backend: as in `clip_loss`; "ring" (for "mean" and "sum") has its gradients home when
            the forward ends, and so needs the same upstream gradient on every rank, as `loss.backward()` gives.

    Raises as `clip_loss` does.  NaN or infinity in the features gives a NaN loss.
    Source: Zhai et al. 2023 (2303.15343), equation 1.
    """
    if strategy not in STRATEGIES:
        checks.choice("strategy", strategy, STRATEGIES)
    if reduction not in targets.REDUCTIONS:
        checks.choice("reduction", reduction, targets.REDUCTIONS)
    if group_mode not in targets.GROUP_MODES:
        checks.choice("group_mode", group_mode, targets.GROUP_MODES)
    candidates = image_negatives is text_negatives is negatives is None
    plain = candidates and group_ids is weights is process_group is None and reduction != "none" and not return_metrics
    if plain and library.only_autograd_looks_on(image_features, text_features, logit_scale, logit_bias):
        loss = known_loss(image_features, text_features, logit_scale, logit_bias, reduction == "mean", backend)
        if loss is not None:
            return loss
        x, y, scale, bias = _inputs(image_features, text_features, logit_scale, logit_bias)
        fused = backends.fused("siglip_loss", backend, x)
        if fused is not None:
            return plain_loss(x, y, scale, bias, 1 / x.shape[0] if reduction == "mean" else 1.0, fused)
    options = {
        "strategy": strategy,
        "group_ids": group_ids is not None and group_mode,
        "image_negatives": image_negatives is not None,
        "text_negatives": text_negatives is not None,
        "weights": weights is not None,
        "reduction": reduction,
        "return_metrics": return_metrics,
        "negatives": negatives and negatives.options(),
    }
    with Agreement("siglip_loss", process_group, **options) as agreement:
        x, y, scale, bias = _inputs(image_features, text_features, logit_scale, logit_bias)
        ids, weights = targets.check_ids(group_ids, x), targets.check_weights(weights, x)
        extra = (
            (x, targets.check_negatives("text_negatives", text_negatives, x)),
            (y, targets.check_negatives("image_negatives", image_negatives, x)),
        )
        if negatives is not None:
            more_pairs.refuse(negatives, group_mode if group_ids is not None else "mask")
            negatives = negatives.checked(x)
        if strategy == "ring" and reduction == "none":
            raise ValueError("strategy 'ring' gives a mean or a sum, not reduction 'none'; use 'gather'")
        if strategy == "ring" and weights is not None and weights.requires_grad:
            raise ValueError("strategy 'ring' has no gradient for weights; use 'gather'")
        if process_group is not None:  # dot_softplus would refuse it too, while the other ranks wait for this one
            checks.positive("logit_scale", scale)
        agreement.describe(image_features=x, text_features=y)
    shards = agreement.shards
    groups = targets.Groups.of(ids, shards)
    common: dict[str, Any] = {"attract": group_mode == "positives", "backend": backend}
    if groups is not None:
        common |= {"row_ids": groups.rows, "col_ids": groups.cols}
    positives = scale * (promote(x) * promote(y)).sum(1) + bias
    if reduction == "none":
        if shards is None:
            rows, cols = dot_softplus_sums(x, y, scale, bias, **common)
        else:
            rows, cols = sharded_dot_softplus_sums(x, y, scale, bias, shards, **common)
        losses = (rows + cols) / 2 + softplus(-positives)
        for anchors, queue in extra:
            if queue is not None:
                more, _ = dot_softplus_sums(
                    anchors, queue, scale, bias, first_positive=queue.shape[0], need_cols=False, backend=backend
                )
                losses = losses + more
        if negatives is not None:
            losses = losses + more_pairs.per_pair(x, y, scale, bias, negatives, shards, **common)
        loss = losses if weights is None else losses * weights
    else:
        c = targets.pair_weights(positives, weights, reduction, shards)
        u, v = (c, None) if weights is None else (c / 2, c / 2)  # a pair (i, j) counts (c_i + c_j) / 2
        if shards is None:
            loss = dot_softplus(x, y, scale, bias, u, v, **common)
        else:
            loss = sharded_dot_softplus(x, y, scale, bias, u, v, shards, strategy=strategy, **common)
        loss = loss + (c * softplus(-positives)).sum()
        for anchors, queue in extra:
            if queue is not None:
                loss = loss + dot_softplus(
                    anchors, queue, scale, bias, c, first_positive=queue.shape[0], backend=backend
                )
        if negatives is not None:
            weighted = weights is not None
            loss = loss + more_pairs.total(x, y, scale, bias, negatives, c, weighted, shards, strategy, **common)
    return (loss, _measure(x, y, scale, bias, positives, shards)) if return_metrics else loss


def _inputs(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checked -> x (n, d), y (n, d), scale (), bias ()."""
    x, y = targets.check_features(image_features, text_features)
    scale = checks.scalar("logit_scale", logit_scale, x)
    return x, y, scale, checks.scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, x)


def _measure(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, positives: Tensor, shards: Shards | None
) -> dict[str, Tensor]:
    """The mean logits of the positives and of all other pairs of the batch (NaN where there are none)."""
    total, n = promote(y.detach()).sum(0), x.shape[0]
    if shards is not None:
        total, n = merge.vector_total(total, shards), shards.total
    sums = (scale * (promote(x) * total).sum(1) + n * bias - positives).detach()
    means = {"positive_logit": positives.detach(), "negative_logit": sums / (n - 1 if n > 1 else float("nan"))}
    return {name: t.mean() if shards is None else merge.mean(t, shards) for name, t in means.items()}
