"""OMIB's loss, and those of its relatives.

    warm-up   sum_i loss(y_i, y)
    main      loss(y, y) + sum_i loss(y_i, y) + beta sum_i r_i KL(N(mu_i, sigma_i^2) || N(0, I))

    KL(N(mu, sigma^2) || N(0, I)) = 1/2 sum(sigma^2 + mu^2 - 1 - log sigma^2)
    r_1 = 1,  r_i = 1 - tanh(log rho_i) = 2 / (1 + rho_i^2)
    rho_i = D_i / D_1,  D_i = KL(p(y_i | xi, z_i) || p(y | xi))      what a branch knows that the fused vector does not

Two readings of rho are in print: the ratio of the batch's means, and the mean of the rows' ratios.  The more of a
modality is missing from the fused vector, the less it is compressed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cibr.errors import UsageError
from cibr.omib.model import Code, Method, Output
from cibr.omib.tasks import Task

RATIOS = ("of_means", "mean_of")
EPS = 1e-8  # nats, beside divergences


def standard_kl(code: Code) -> Tensor:
    """KL of each row's Gaussian to N(0, I) -> (n,) nats; its mean is an upper bound on I(Z; X)."""
    return ((2 * code.log_std).exp() + code.mean.square() - 1 - 2 * code.log_std).sum(1) / 2


def dynamic_ratio(divergences: Sequence[Tensor], ratio: str = "of_means") -> Tensor:
    """D_1 ... D_m, (n,) each -> r (m,), without gradient; r_1 = 1, the others between 0 and 2.

    ratio: "of_means" or "mean_of" rows' ratios.  Raises UsageError for another.
    """
    if ratio not in RATIOS:
        raise UsageError(f"--ratio is {ratio!r}; known are {', '.join(RATIOS)}")
    d = torch.stack([t.detach() for t in divergences]).float() + EPS  # (m, n)
    rho = d.mean(1) / d[0].mean() if ratio == "of_means" else (d / d[0]).mean(1)
    return 2 / (1 + rho.square())  # r_1: rho is 1


class Omf(nn.Module):
    """`parts = objective(output, batch)`: "loss" carries the gradient, the others are for the log."""

    def __init__(self, task: Task, method: Method, *, beta: float = 0.0, ratio: str = "of_means") -> None:
        super().__init__()
        if ratio not in RATIOS:
            raise UsageError(f"--ratio is {ratio!r}; known are {', '.join(RATIOS)}")
        if not beta >= 0:
            raise UsageError(f"--beta is {beta}, but must not be negative")
        self.task, self.method, self.beta, self.ratio = task, method, beta, ratio

    def forward(self, output: Output, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        target = batch["target"]
        parts = {
            f"branch_{i}_loss": self.task.loss(prediction, target, 1 + i).mean()
            for i, prediction in enumerate(output.branches)
        }
        if output.fused is not None:
            parts["task_loss"] = self.task.loss(output.fused, target).mean()
        loss = torch.stack(list(parts.values())).sum()
        if output.fused is not None and output.codes:
            r = self.weights(output)
            nats = torch.stack([standard_kl(code).mean() for code in output.codes])
            loss = loss + self.beta * (r * nats).sum()
            parts |= {f"kl_{i}": value for i, value in enumerate(nats)}
            parts |= {f"r_{i}": r[i] for i in range(1, len(r))}
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}

    def weights(self, output: Output) -> Tensor:
        """r (m,) of every code."""
        if not self.method.dynamic:
            return torch.ones(len(output.codes))
        assert output.fused is not None
        pairs = enumerate(output.branches)
        return dynamic_ratio([self.task.divergence(b, output.fused, 1 + i) for i, b in pairs], self.ratio)
