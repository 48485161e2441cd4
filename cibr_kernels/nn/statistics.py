"""What an objective remembers of the batches it has seen: a moving average and the moments of features.

Both ignore a batch with a NaN or an infinity: its own loss is NaN, later ones are not.  Both stay float32 where a
module is cast to half precision, in which an average would lose its small steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cibr_kernels import checks
from cibr_kernels.distributed import Shards, merge
from cibr_kernels.nn import statistics_device
from cibr_kernels.numerics import WIDE, promote


class _Float32Buffers(nn.Module):
    """A module without parameters whose floating buffers are float32, or float64 after `.double()`, never less."""

    started: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def kept(t: Tensor) -> Tensor:
            made = fn(t)
            return t.to(made.device) if made.is_floating_point() and made.itemsize < 4 else made

        return super()._apply(kept, recurse)

    def _register(self, **buffers: Tensor) -> None:
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        for name, t in buffers.items():
            self.register_buffer(name, t.to(wide))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forgets all batches."""
        raise NotImplementedError

    def _moved(self, name: str, value: Tensor, good: Tensor) -> Tensor:
        """The buffer, moved to `value` where this batch is `good`, (): decided without waiting for the device."""
        buffer: Tensor = getattr(self, name)
        if buffer.dtype == value.dtype and not torch.compiler.is_compiling():
            return torch.where(good, value, buffer, out=buffer)
        kept = torch.where(good, value, promote(buffer))
        buffer.copy_(kept)
        return kept


class LogEMA(_Float32Buffers):
    """The log of a moving average of e^L, for MINE's corrected gradient; all in log space, so e^L may overflow.

    log_ema <- log(decay e^log_ema + (1 - decay) e^L): `decay` weighs the old value.  The first L starts it; one that is
    not finite is ignored.  Called with L it returns the log average, moved by L in training mode only.
    Raises ValueError for a decay outside of [0, 1), and for more than one L.
    """

    value: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self._register(value=torch.zeros(()))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forgets all batches."""
        self.value.zero_()
        self.started.fill_(False)

    def forward(self, el: Tensor) -> Tensor:
        return self.update(el) if self.training else promote(self.value)

    @torch.no_grad()
    def update(self, el: Tensor) -> Tensor:
        """Takes one training batch's L (0-d, nats) in and returns the new log average; call once per optimiser step."""
        el = checks.scalar("L", el.detach(), self.value)
        log_decay = math.log(self.decay) if self.decay > 0 else float("-inf")
        moved = torch.logaddexp(promote(self.value) + log_decay, el + math.log1p(-self.decay))
        good = el.isfinite()
        average = self._moved("value", torch.where(self.started, moved, el), good)
        self.started.logical_or_(good)
        return average.clone()  # the buffer moves on


class Standardize(_Float32Buffers):
    """(x - mean) / std by running statistics of the training batches, detached, without learnt parameters.

    The first batch starts the statistics; momentum is the weight of a new batch; one with a number that is not finite
    (on any rank) is ignored.  Features that do not vary become 0.
    Raises TypeError and ValueError for what is no (n, dim) of floating numbers.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, dim: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.momentum, self.eps = dim, momentum, eps
        self._register(mean=torch.zeros(dim), var=torch.ones(dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forgets all batches."""
        self.mean.zero_()
        self.var.fill_(1.0)
        self.started.fill_(False)

    def forward(self, x: Tensor, shards: Shards | None = None) -> Tensor:
        """(n, dim) of any float dtype -> (n, dim) float32 (float64 of a float64 module), no gradient.

        Statistics move in training mode only; with `shards` they are those of the rows of all ranks.
        """
        if self.training and shards is None:
            known = statistics_device.known(x, self._buffers, self.momentum, self.eps)
            if known is not None:
                return known
        with torch.no_grad():
            return self._forward(x, shards)

    def _forward(self, x: Tensor, shards: Shards | None) -> Tensor:
        checks.matching(x=x)
        checks.width("x", x, self.dim, "Standardize")
        mean, var = self.mean, self.var
        if mean.dtype not in WIDE or var.dtype not in WIDE:  # loaded with assign=True
            mean, var = promote(mean), promote(var)
        if self.training and shards is None and mean is self.mean and statistics_device.serves(x, mean):
            return statistics_device.train(x, mean, var, self.started, self.momentum, self.eps)
        x = x.detach().to(mean.dtype)
        if self.training:
            weight = torch.where(self.started, self.momentum, 1.0).to(mean.dtype)
            new_var, new_mean = torch.var_mean(x, 0, unbiased=False)
            if shards is not None:
                new_mean, new_var = merge.statistics(new_mean, new_var, shards)
            good = torch.linalg.vector_norm(new_mean + new_var, math.inf) < math.inf
            mean = self._moved("mean", mean.lerp(new_mean, weight), good)
            var = self._moved("var", var.lerp(new_var, weight), good)
            self.started.logical_or_(good)
        if x.is_cuda:
            return F.batch_norm(x, mean, var, eps=self.eps)  # the same in one launch
        return (x - mean) * (var + self.eps).rsqrt()
