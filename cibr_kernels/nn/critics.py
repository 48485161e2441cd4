"""Critics: T(x, z) of a pair, in the two forms that have kernels over all pairs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cibr_kernels.primitives.additive.moments.reference import ACTIVATIONS


class ConcatCritic(nn.Module):
    """T(x, z) of an MLP on [x, z] whose first layer is split so that pairs add, with one or two hidden layers.

        layers 1    w . phi(a + b) + c2    a = Wx x, b = Wz z + c    all pairs without n x n x hidden
        layers 2    w . phi(W2 phi(a + b) + b2) + c2    shifts(k) in O(n hidden); all pairs in panels of rows: slow

    Args: x_dim, z_dim and hidden widths; activation, one of relu, leaky_relu, gelu, gelu_tanh, silu, elu, softplus,
    tanh; slope, leaky_relu's negative slope or elu's alpha (defaults: torch's); layers, the number of hidden layers.
        storage: bfloat16 or float16 to keep a and b, and the gradients of them, in half the memory; scores and sums
            stay float32.  Not the default: it rounds a and b, an error of the input that nothing undoes (in bfloat16
            scores of standard deviation 1.1 move by 0.0024, at most 0.011).  One hidden layer only.
    Raises ValueError for other names, layers, dtypes and non-positive widths.
    """

    def __init__(
        self, x_dim: int, z_dim: int, hidden: int = 512, layers: int = 1, *, activation: str = "relu",
        slope: float | None = None, storage: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if storage not in (None, torch.float32, torch.bfloat16, torch.float16) or (storage and layers == 2):
            raise ValueError(
                f"storage must be float32, bfloat16 or float16, of one hidden layer, got {storage} with layers={layers}"
            )
        if layers not in (1, 2):
            raise ValueError(f"ConcatCritic has one or two hidden layers, got layers={layers}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; known are {', '.join(map(repr, ACTIVATIONS))}")
        if min(x_dim, z_dim, hidden) < 1:
            raise ValueError(f"widths must be positive, got x_dim={x_dim}, z_dim={z_dim}, hidden={hidden}")
        self.activation = activation
        self.slope = (1.0 if activation == "elu" else 0.01) if slope is None else slope
        self.storage = storage
        self.x_proj = nn.Linear(x_dim, hidden, bias=False)
        self.z_proj = nn.Linear(z_dim, hidden)
        self.inner = nn.Linear(hidden, hidden) if layers == 2 else None
        self.out = nn.Linear(hidden, 1)
        limit = 1 / math.sqrt(x_dim + z_dim)  # the layer nn.Linear(x_dim + z_dim, hidden) would have been
        for p in (self.x_proj.weight, self.z_proj.weight, self.z_proj.bias):
            nn.init.uniform_(p, -limit, limit)

    @property
    def additive_parts(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor, str, float]]:
        """x (n, x_dim), z (m, z_dim) -> a (n, hidden), b (m, hidden), w (hidden,), c2 (), activation, slope.

        There for one hidden layer only: the scores of two are no function of this kind (AttributeError).
        """
        if self.inner is not None:
            raise AttributeError("a ConcatCritic with two hidden layers has pair_parts, but no additive_parts")
        return self._additive_parts

    def _additive_parts(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, str, float]:
        w, bias = self.out.weight.squeeze(0), self.out.bias.squeeze(0)
        a, b = self.pair_parts(x, z)
        if self.storage is not None and a.dtype != torch.float64:
            a, b = a.to(self.storage), b.to(self.storage)
        return a, b, w, bias, self.activation, self.slope

    @property
    def pair_width(self) -> int:
        """Numbers that `score_parts` holds per pair for its backward."""
        return self.out.in_features * (2 if self.inner is None else 4)

    def pair_parts(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., x_dim), z (..., z_dim) -> a (..., hidden), b (..., hidden)."""
        for name, t, layer in (("x", x, self.x_proj), ("z", z, self.z_proj)):
            if t.shape[-1] != layer.in_features:
                raise ValueError(f"{name} has width {t.shape[-1]} but the critic was made for {layer.in_features}")
        return self.x_proj(x), self.z_proj(z)

    def score_parts(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b (..., hidden), which broadcast -> scores (...)."""
        phi = ACTIVATIONS[self.activation][0]
        hidden = phi(a + b, self.slope)
        if self.inner is not None:
            hidden = phi(self.inner(hidden), self.slope)
        return self.out(hidden).squeeze(-1)

    def pairwise(self, x: Tensor, z: Tensor) -> Tensor:
        """x (n, x_dim), z (m, z_dim) -> (n, m): the eager definition, which builds (n, m, hidden)."""
        return self.paired(x[:, None], z[None])

    def paired(self, x: Tensor, z: Tensor) -> Tensor:
        """x (..., x_dim), z (..., z_dim) -> (...): the critic on matching rows."""
        return self.score_parts(*self.pair_parts(x, z))


class SeparableCritic(nn.Module):
    """T(x, z) = <f(x), g(z)> with f and g two-layer ReLU MLPs into `embed_dim`, or any two modules (`from_maps`)."""

    def __init__(self, x_dim: int, z_dim: int, hidden: int = 512, embed_dim: int = 128) -> None:
        super().__init__()
        if min(x_dim, z_dim, hidden, embed_dim) < 1:
            raise ValueError(f"widths must be positive, got {x_dim}, {z_dim}, {hidden}, {embed_dim}")
        self.embed_x: nn.Module = nn.Sequential(nn.Linear(x_dim, hidden), nn.ReLU(), nn.Linear(hidden, embed_dim))
        self.embed_z: nn.Module = nn.Sequential(nn.Linear(z_dim, hidden), nn.ReLU(), nn.Linear(hidden, embed_dim))

    @classmethod
    def from_maps(cls, embed_x: nn.Module, embed_z: nn.Module) -> SeparableCritic:
        """The critic <embed_x(x), embed_z(z)>; both give (rows, k)."""
        critic = cls(1, 1, 1, 1)
        critic.embed_x, critic.embed_z = embed_x, embed_z
        return critic

    def dot_parts(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, x_dim), z (m, z_dim) -> f (n, k), g (m, k)."""
        return self.embed_x(x), self.embed_z(z)

    def pairwise(self, x: Tensor, z: Tensor) -> Tensor:
        """-> (n, m) scores: the eager definition."""
        return self.embed_x(x) @ self.embed_z(z).T

    def paired(self, x: Tensor, z: Tensor) -> Tensor:
        """-> (n,) scores of matching rows."""
        return (self.embed_x(x) * self.embed_z(z)).sum(-1)
