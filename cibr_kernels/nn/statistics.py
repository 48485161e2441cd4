"""What an objective remembers of the batches it has seen: a moving average and the moments of features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cibr_kernels.distributed import Shards, merge


class LogEMA(nn.Module):
    """The log of a moving average of e^L, for MINE's corrected gradient; all in log space, so e^L may overflow.

    log_ema <- log(decay e^log_ema + (1 - decay) e^L): `decay` weighs the old value.  The first L starts it.
    Called with L it returns the log average, moved by L in training mode only.
    """

    value: Tensor
    started: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("value", torch.zeros(()))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(self, el: Tensor) -> Tensor:
        return self.update(el) if self.training else self.value

    @torch.no_grad()
    def update(self, el: Tensor) -> Tensor:
        """Takes one training batch's L (0-d, nats) in and returns the new log average; call once per optimiser step."""
        el = el.detach().float()
        log_decay = math.log(self.decay) if self.decay > 0 else float("-inf")
        moved = torch.logaddexp(self.value + log_decay, el + math.log1p(-self.decay))
        self.value.copy_(torch.where(self.started, moved, el))
        self.started.fill_(True)
        return self.value


class Standardize(nn.Module):
    """(x - mean) / std by running statistics of the training batches, detached, without learnt parameters.

    The first batch starts the statistics; momentum is the weight of a new batch.  Features that do not vary become 0.
    """

    mean: Tensor
    var: Tensor
    started: Tensor

    def __init__(self, dim: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def forward(self, x: Tensor, shards: Shards | None = None) -> Tensor:
        """(n, dim) of any float dtype -> (n, dim) float32 (float64 of a float64 module), no gradient.

        Statistics move in training mode only; with `shards` they are those of the rows of all ranks.
        """
        x = x.detach().to(torch.promote_types(self.mean.dtype, torch.float32))
        if self.training:
            weight = torch.where(self.started, self.momentum, 1.0)
            var, mean = torch.var_mean(x, 0, unbiased=False)
            if shards is not None:
                mean, var = merge.statistics(mean, var, shards)
            self.mean.lerp_(mean, weight)
            self.var.lerp_(var, weight)
            self.started.fill_(True)
        return (x - self.mean) * (self.var + self.eps).rsqrt()
