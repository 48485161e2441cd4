"""The pairwise sigmoid loss (SigLIP), whose n x n logits are never stored.

    l_ij = scale <x_i, y_j> + bias
    loss = 1/n [ sum_i softplus(-l_ii) + sum_{i != j} softplus(l_ij) ]

The second sum is `dot_softplus`, which makes its gradients in the same pass: 1 matmul pass where no gradient is needed,
else 3.  The positives and everything else are O(n d).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from cibr_kernels import checks
from cibr_kernels.dispatch import backends, library
from cibr_kernels.distributed.lse import STRATEGIES
from cibr_kernels.distributed.shards import Agreement, Shards
from cibr_kernels.losses import targets
from cibr_kernels.losses.clip.options import Negatives
from cibr_kernels.losses.siglip.fast_path import known_loss, plain_loss
from cibr_kernels.losses.siglip.problem import Problem


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
        ids = targets.check_ids(group_ids, x)
        problem = Problem(
            image=x,
            text=y,
            scale=scale,
            bias=bias,
            image_negatives=targets.check_negatives("image_negatives", image_negatives, x),
            text_negatives=targets.check_negatives("text_negatives", text_negatives, x),
            negatives=negatives,
            weights=targets.check_weights(weights, x),
            groups=None,
            attract=ids is not None and group_mode == "positives",
            shards=None,
            strategy=strategy,
            backend=backend,
        )
        _refuse(problem, reduction)
        if negatives is not None:
            problem = replace(problem, negatives=negatives.checked(x))
        if process_group is not None:  # dot_softplus would refuse it too, while the other ranks wait for this one
            checks.positive("logit_scale", scale)
        agreement.describe(image_features=x, text_features=y)
    shards = agreement.shards
    if shards is not None or ids is not None:
        problem = replace(problem, shards=shards, groups=targets.Groups.of(ids, shards))
    positives = problem.positives()
    loss = problem.losses(positives) if reduction == "none" else problem.total(positives, reduction)
    return (loss, problem.means(positives)) if return_metrics else loss


def _refuse(problem: Problem, reduction: str) -> None:
    """Raises ValueError, with the reason, for options that do not go together or are about a softmax."""
    negatives, ring = problem.negatives, problem.strategy == "ring"
    if negatives is not None:
        if negatives.one_way:
            raise ValueError(
                "siglip_loss needs both 'image_to_text' and 'text_to_image' among the directions: a sigmoid counts a "
                "pair once, for both"
            )
        if negatives.joint:
            raise ValueError("siglip_loss has no joint: it asks for one softmax over all directions, and there is none")
        if negatives.hardness:
            raise ValueError(
                "siglip_loss has no hardness: it weighs candidates in a softmax's denominator, and has none"
            )
        if negatives.margin is not None:
            raise ValueError(
                "siglip_loss has no margin: the kernels of sigmoids know no limits; mask pairs by group_ids"
            )
        if problem.attract:
            raise ValueError("negatives and group_mode 'positives' do not go together")
    if ring and reduction == "none":
        raise ValueError("strategy 'ring' gives a mean or a sum, not reduction 'none'; use 'gather'")
    if ring and problem.weights is not None and problem.weights.requires_grad:
        raise ValueError("strategy 'ring' has no gradient for weights; use 'gather'")


def _inputs(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checked -> x (n, d), y (n, d), scale (), bias ()."""
    x, y = targets.check_features(image_features, text_features)
    scale = checks.scalar("logit_scale", logit_scale, x)
    return x, y, scale, checks.scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, x)
