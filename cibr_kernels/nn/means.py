"""The network of the upper bound "ceb": the mean of one modality's embedding given the other's data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cibr_kernels import checks
from cibr_kernels.information.wrappers import in_its_dtype


class MeanNetwork(nn.Module):
    """y (n, y_dim) -> mean of z (n, z_dim): an MLP with one hidden layer of ReLUs, which starts at 0.

    There the bound is |z|^2 / 2 s^2, whose gradient a normalised z cannot follow: an untrained mean does nothing.
    Raises ValueError for widths that are not positive, and for y of another width.
    """

    def __init__(self, y_dim: int, z_dim: int, hidden: int = 512) -> None:
        super().__init__()
        if min(y_dim, z_dim, hidden) < 1:
            raise ValueError(f"widths must be positive, got y_dim={y_dim}, z_dim={z_dim}, hidden={hidden}")
        self.y_dim, self.z_dim = y_dim, z_dim
        self.hidden, self.out = nn.Linear(y_dim, hidden), _Zero(hidden, z_dim)

    def forward(self, y: Tensor) -> Tensor:
        """(n, y_dim) -> (n, z_dim), in the dtype of the weights."""
        checks.width("y", y, self.y_dim, "MeanNetwork")
        return self.out(torch.relu(self.hidden(in_its_dtype("y", y, self.hidden))))


class _Zero(nn.Linear):
    @torch.no_grad()
    def reset_parameters(self) -> None:
        for p in self.parameters():
            p.zero_()
