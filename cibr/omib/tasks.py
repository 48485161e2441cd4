"""What is predicted: a class, a number, or membership in the one class that training shows.

    classification   loss = -log softmax(p)_y          KL of two predictions: that of their softmaxes
    regression       loss = (p - y)^2                  of two Gaussians of unit variance: (p - q)^2 / 2
    one-class        loss = |p - c|^2                  the same, of the offsets from their centres

One-class is Deep SVDD (Ruff et al., 2018): c is where a head's mean output was before training, its small components
moved to 0.1, and no layer has a bias, by which all rows could be mapped onto c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cibr.errors import UsageError, missing_extra

SMALLEST_CENTRE = 0.1  # a component of c nearer to 0 is met by weights of 0


class Task(nn.Module):
    """`width`: of a head's output; `biases`: whether layers have them.  Head 0 is the fused one, then the branches'."""

    width: int
    biases = True
    measure: str  # the entry of `metrics` by which runs are compared; more is better
    centres: Tensor

    def start(self, predictions: Sequence[Tensor]) -> None:
        """Told what every head says of the training rows before the first step."""

    def check(self, target: Tensor, training: bool) -> None:
        """Raises UsageError for targets (n,) that are none of this task's."""

    def loss(self, prediction: Tensor, target: Tensor, head: int = 0) -> Tensor:
        """(n, width) and (n,) -> (n,)."""
        raise NotImplementedError

    def divergence(self, branch: Tensor, fused: Tensor, head: int) -> Tensor:
        """KL(p(. | branch) || p(. | fused)) -> (n,) nats."""
        raise NotImplementedError

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        raise NotImplementedError


class Classification(Task):
    measure = "accuracy"

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.width = classes

    def check(self, target: Tensor, training: bool) -> None:
        if target.is_floating_point() or int(target.min()) < 0 or int(target.max()) >= self.width:
            raise UsageError(
                f"classes must be whole numbers from 0 to {self.width - 1}, got {target.unique().tolist()[:9]}"
            )

    def loss(self, prediction: Tensor, target: Tensor, head: int = 0) -> Tensor:
        return F.cross_entropy(prediction, target, reduction="none")

    def divergence(self, branch: Tensor, fused: Tensor, head: int) -> Tensor:
        p, q = branch.log_softmax(1), fused.log_softmax(1)
        return (p.exp() * (p - q)).sum(1)

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """Accuracy, a share of 1."""
        return {"accuracy": (prediction.argmax(1) == target).double().mean().item()}


class Regression(Task):
    width = 1
    measure = "r2"

    def check(self, target: Tensor, training: bool) -> None:
        if not target.is_floating_point() or not torch.isfinite(target).all():
            raise UsageError(f"regression needs finite floating-point targets, got {target.dtype}")

    def loss(self, prediction: Tensor, target: Tensor, head: int = 0) -> Tensor:
        return (prediction[:, 0] - target).square()

    def divergence(self, branch: Tensor, fused: Tensor, head: int) -> Tensor:
        return (branch - fused).square().sum(1) / 2

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """R^2 and MAE; Acc2 and F1 (weighted by class) of the sign over targets that are not 0, as MOSI is quoted."""
        p, t = prediction[:, 0].double(), target.double()
        r2 = 1 - ((p - t).square().mean() / t.var(unbiased=False)).item()
        told = t != 0
        said, truth = p[told] > 0, t[told] > 0
        accuracy, f1 = (said == truth).double().mean().item(), 0.0
        for label in (False, True):
            ours, theirs = said == label, truth == label
            hits, either = (ours & theirs).sum().item(), (ours.sum() + theirs.sum()).item()
            f1 += theirs.double().mean().item() * (2 * hits / either if either else 0.0)
        return {"r2": r2, "mae": (p - t).abs().mean().item(), "acc2": accuracy, "f1": f1}


class OneClass(Task):
    """Targets are 0 for the class that training shows and 1 for anomalies."""

    biases = False
    measure = "auc"

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("centres", torch.zeros(0, width))

    def start(self, predictions: Sequence[Tensor]) -> None:
        means = torch.stack([prediction.mean(0) for prediction in predictions]).detach()
        signs = torch.where(means < 0, -1.0, 1.0)
        self.centres = torch.where(means.abs() < SMALLEST_CENTRE, SMALLEST_CENTRE * signs, means)

    def check(self, target: Tensor, training: bool) -> None:
        if target.is_floating_point() or not bool(((target == 0) | (target == 1)).all()):
            raise UsageError("one-class targets are 0 for the normal class and 1 for anomalies")
        if training and bool(target.any()):
            raise UsageError("one-class training takes normal rows only, of target 0")

    def loss(self, prediction: Tensor, target: Tensor, head: int = 0) -> Tensor:
        return (prediction - self.centres[head]).square().sum(1)

    def divergence(self, branch: Tensor, fused: Tensor, head: int) -> Tensor:
        apart = (branch - self.centres[head]) - (fused - self.centres[0])
        return apart.square().sum(1) / 2

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """The area under the ROC curve of the distance from the centre."""
        try:
            from sklearn.metrics import roc_auc_score
        except ImportError as error:
            raise missing_extra(error) from error
        return {"auc": float(roc_auc_score(target.numpy(), self.loss(prediction, target).detach().numpy()))}


TASKS: dict[str, type[Task]] = {"class": Classification, "value": Regression, "anomaly": OneClass}


def build(name: str, **options: Any) -> Task:
    """Raises UsageError for an unknown task."""
    if name not in TASKS:
        raise UsageError(f"--task is {name!r}; known are {', '.join(TASKS)}")
    return TASKS[name](**options)
