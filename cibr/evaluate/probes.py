"""What embeddings hold besides the shared content: probes, variance, neighbours, and how alike two spaces are."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cibr.errors import UsageError, missing_extra
from cibr.evaluate.retrieval import check_features

STRENGTHS = tuple(10.0**power for power in range(-3, 3))  # inverse regularisation C of the logistic regression


def linear_probe(
    train: Tensor,  # (n, d)
    train_labels: Tensor,  # (n,) int64
    test: Tensor,  # (m, d)
    test_labels: Tensor,  # (m,) int64
    *,
    noise_std: float = 0.0,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy in per cent of a logistic regression (LBFGS, standardised columns), and of the commonest class.

    Its C is the best of `STRENGTHS` on a fifth of the training rows, then it is fitted to all. `noise_std` > 0 makes it
    the noisy probe: it is trained on and asked about z + N(0, noise_std^2), the channel that CIBR's penalty prices.
    Raises UsageError for features that are not finite and for fewer than two classes or five rows to train on.
    """
    for name, features in (("the probe's training features", train), ("the probe's test features", test)):
        check_features(name, features)
    if len(train) < 5 or len(train_labels.unique()) < 2:
        raise UsageError(
            f"a probe needs five rows of two classes to train on, got {len(train)} of {len(train_labels.unique())}"
        )
    generator = torch.Generator().manual_seed(seed)
    x, z = ((f.cpu().float() + noise_std * torch.randn(f.shape, generator=generator)).numpy() for f in (train, test))
    y, t = train_labels.cpu().numpy(), test_labels.cpu().numpy()
    order = torch.randperm(len(x), generator=generator).numpy()
    held, kept = order[: len(x) // 5], order[len(x) // 5 :]
    if len(np.unique(y[kept])) < 2:
        kept = order
    score = {c: _fitted(x[kept], y[kept], c).score(x[held], y[held]) for c in STRENGTHS}
    best = max(STRENGTHS, key=lambda c: score[c])  # the strongest regularisation among equals
    return {
        "accuracy": 100 * float(_fitted(x, y, best).score(z, t)),
        "majority": 100 * float(np.bincount(t).max() / len(t)),
        "c": best,
    }


def _fitted(x: np.ndarray, y: np.ndarray, c: float) -> Any:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise missing_extra(error) from error
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fit that stops at max_iter is good enough for a probe
        return probe.fit(x, y)


def within_class_share(features: Tensor, labels: Tensor) -> float:
    """Share of the variance of features (n, d) that labels (n,) leave: 0 to 1, and about 1 if they say nothing.

    With an artist's drawing of a concept in each row and the concept as its label this is the style's share of the
    variance. A linear probe does not see features shrink within a class; this does. Both variances are the unbiased
    ones, tr S_within / (n - classes) and tr S / (n - 1). Raises UsageError if no class has two rows.
    """
    check_features("the features", features)
    _, group = labels.unique(return_inverse=True)
    classes = int(group.max()) + 1
    if classes == len(features):
        raise UsageError("every row is a class of its own, so there is no variance within a class")
    x = features.double()
    count = torch.bincount(group, minlength=classes)
    mean = torch.zeros(classes, x.shape[1], dtype=x.dtype).index_add_(0, group, x) / count[:, None]
    within = (x - mean[group]).square().sum() / (len(x) - classes)
    total = (x - x.mean(0)).square().sum() / (len(x) - 1)
    if total == 0:
        raise UsageError("the features of all rows are the same: they have no variance to share")
    return (within / total).item()


def same_style_neighbours(features: Tensor, labels: Tensor, styles: Tensor, k: int = 10) -> dict[str, float]:
    """Per cent of a row's k nearest rows of other labels that share its style, and what chance would give.

    features (n, d) of unit norm, labels and styles (n,) int64. Raises UsageError where a row has fewer than k others.
    """
    check_features("the features", features)
    other = labels[:, None] != labels[None, :]
    same = (styles[:, None] == styles[None, :]) & other
    if int(other.sum(1).min()) < k:
        raise UsageError(f"a row has only {int(other.sum(1).min())} rows of other labels, fewer than the {k} asked for")
    nearest = (features @ features.T).masked_fill(~other, -torch.inf).topk(k, dim=1).indices
    chance = (same.sum(1) / other.sum(1)).mean()
    return {"same_style": 100 * same.gather(1, nearest).double().mean().item(), "chance": 100 * chance.item()}


def cka(x: Tensor, y: Tensor) -> dict[str, float]:
    """Linear centred kernel alignment of the rows of x (n, dx) and y (n, dy), `biased` and `debiased`.

    The biased one (Kornblith et al., 1905.00414) of independent Gaussians is far from 0 unless n is far above d; the
    debiased one, by the unbiased estimate of HSIC (Song et al., 2012), is 0 there in the mean. Memory is O(n^2).
    Raises UsageError for fewer than four rows, and for features that are not finite or all the same.
    """
    grams, n = [], len(x)
    if n != len(y) or n < 4:
        raise UsageError(f"CKA compares the same rows, at least four, in two spaces; got {n} and {len(y)}")
    for name, features in (("the first features", x), ("the second features", y)):
        check_features(name, features)
        centred = features.double() - features.double().mean(0)
        if not centred.any():
            raise UsageError(f"{name} are the same in all rows: there is nothing to align")
        grams.append(centred @ centred.T)
    biased = [(a * b).sum() for a, b in ((grams[0], grams[1]), (grams[0], grams[0]), (grams[1], grams[1]))]
    for gram in grams:
        gram.fill_diagonal_(0)
    debiased = [_hsic(a, b) for a, b in ((grams[0], grams[1]), (grams[0], grams[0]), (grams[1], grams[1]))]
    return {name: (xy / (xx * yy).sqrt()).item() for name, (xy, xx, yy) in (("biased", biased), ("debiased", debiased))}


def _hsic(k: Tensor, m: Tensor) -> Tensor:
    """The unbiased HSIC of two Gram matrices (n, n) whose diagonals are 0, times n (n - 3)."""
    n = len(k)
    rows_k, rows_m = k.sum(1), m.sum(1)
    return (k * m).sum() + rows_k.sum() * rows_m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows_k @ rows_m


def mutual_knn(x: Tensor, y: Tensor, k: int = 10) -> float:
    """Per cent of the k nearest neighbours by cosine that x (n, dx) and y (n, dy) share, averaged over rows.

    Chance is 100 k / (n - 1). Raises UsageError for k of n - 1 or more, and for features that are not finite.
    """
    n = len(x)
    if n != len(y) or not 0 < k < n - 1:
        raise UsageError(f"the same rows in two spaces and fewer neighbours than rows: got {n}, {len(y)} and k = {k}")
    near = []
    for name, features in (("the first features", x), ("the second features", y)):
        check_features(name, features)
        unit = torch.nn.functional.normalize(features.double(), dim=1)
        chosen = (unit @ unit.T).fill_diagonal_(-torch.inf).topk(k, dim=1).indices
        near.append(torch.zeros(n, n, dtype=torch.bool).scatter_(1, chosen, True))
    return 100 * (near[0] & near[1]).sum().item() / (n * k)
