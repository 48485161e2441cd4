"""Batch norm with the statistics of all ranks' rows, so that a run does not depend on how many ranks there are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cibr_kernels.distributed import gather_rows


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, over the rows of all ranks of `process_group` where there is one, on the CPU too."""

    process_group: ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width), any n; the statistics in float32."""
        group = self.process_group
        if group is None or not self.training:
            return super().forward(x)
        var, mean = torch.var_mean(x.float(), (0, 2, 3), unbiased=False)
        count = torch.full_like(mean, x.numel() / x.shape[1])
        counts, means, variances = gather_rows(torch.stack([count, mean, var])[None], group).unbind(1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        var = (counts * (variances + (means - mean).square())).sum(0) / total
        with torch.no_grad():
            assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * total / (total - 1), self.momentum)
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(x.dtype)


def over_ranks(model: nn.Module, group: ProcessGroup) -> None:
    """Makes every plain batch norm of `model` one over the rows of `group`'s ranks; parameters keep their names."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm
        if isinstance(module, BatchNorm):
            module.process_group = group
