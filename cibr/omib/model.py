"""Encoders, a bottleneck, fusion by cross-attention, and heads.

    z_i = Enc_i(v_i)                                          an MLP
    y_i = Dec_i([z_i; e]),  e ~ N(0, I)                       warm-up: the task-relevance branches alone
    y_i = Dec_i([z_i; xi])                                    main stage
    zeta_i = mu_i(z_i) + sigma_i(z_i) * noise                 bottleneck "each", of every modality
    xi = CAN(zeta_1, zeta_2, ...),  y = Dec(xi)

CAN: a zeta is so many tokens; those of a modality attend to those of all others, and what all have become is projected.
Where the bottleneck is "fused", zeta_i = mu_i and xi itself is a Gaussian of CAN's output, as in VIB (1612.00410).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cibr.errors import UsageError
from cibr.omib.tasks import Task

FIRST_LOG_STD = -2.0  # the noise at the start, small beside the means


@dataclass(frozen=True)
class Method:
    """A member of the family: what is between the encoders and the label."""

    branches: bool  # task-relevance branches, and a warm-up of them
    bottleneck: str  # "none", "each" modality, or the "fused" vector
    dynamic: bool  # whether r follows the branches; otherwise it is 1


METHODS = {
    "fusion": Method(branches=False, bottleneck="none", dynamic=False),
    "branches": Method(branches=True, bottleneck="none", dynamic=False),
    "vib": Method(branches=False, bottleneck="fused", dynamic=False),
    "fixed": Method(branches=True, bottleneck="each", dynamic=False),
    "omib": Method(branches=True, bottleneck="each", dynamic=True),
}


@dataclass(frozen=True)
class Code:
    """A diagonal Gaussian a row: (n, d) each."""

    mean: Tensor
    log_std: Tensor

    def sample(self, noisy: bool) -> Tensor:
        return self.mean + self.log_std.exp() * torch.randn_like(self.mean) if noisy else self.mean


@dataclass(frozen=True)
class Output:
    fused: Tensor | None  # (n, k) of the fused head; None in the warm-up
    branches: tuple[Tensor, ...]  # (n, k) of each modality's branch; none where the method has none
    codes: tuple[Code, ...]  # of every bottleneck


def mlp(*widths: int, bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class CrossAttention(nn.Module):
    """m vectors (n, tokens * width) -> (n, out)."""

    def __init__(self, m: int, tokens: int, width: int, out: int, bias: bool) -> None:
        super().__init__()
        self.tokens = tokens
        self.attend = nn.ModuleList(nn.MultiheadAttention(width, 1, bias=bias, batch_first=True) for _ in range(m))
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=bias) for _ in range(m))
        self.project = nn.Linear(m * tokens * width, out, bias=bias)

    def forward(self, vectors: Sequence[Tensor]) -> Tensor:
        cut = [v.unflatten(1, (self.tokens, -1)) for v in vectors]
        seen = []
        for i, (own, attend, norm) in enumerate(zip(cut, self.attend, self.norms, strict=True)):
            others = torch.cat([t for j, t in enumerate(cut) if j != i], 1)
            seen.append(norm(own + attend(own, others, others, need_weights=False)[0]).flatten(1))
        return self.project(torch.cat(seen, 1))


class Fusion(nn.Module):
    """All methods; the parts that a method has not are not built.

    widths: of the views.  Raises UsageError for fewer than two views, an unknown method and a latent that tokens do
    not divide.
    """

    def __init__(
        self,
        widths: Sequence[int],
        task: Task,
        method: str = "omib",
        *,
        hidden: int = 64,
        latent: int = 16,
        tokens: int = 4,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise UsageError(f"--method is {method!r}; known are {', '.join(METHODS)}")
        if len(widths) < 2:
            raise UsageError(f"fusion takes two modalities or more, got {len(widths)}")
        if latent % tokens:
            raise UsageError(f"--latent is {latent}, but must be a multiple of --tokens, which is {tokens}")
        m, bias, self.method = len(widths), task.biases, METHODS[method]
        self.latent = latent
        self.encoders = nn.ModuleList(mlp(width, hidden, hidden, hidden, bias=bias) for width in widths)
        each, fused = (self.method.bottleneck == kind for kind in ("each", "fused"))
        self.to_code = nn.ModuleList(nn.Linear(hidden, (1 + each) * latent, bias=bias) for _ in widths)
        self.attention = CrossAttention(m, tokens, latent // tokens, (1 + fused) * latent, bias)
        self.head = mlp(latent, hidden, task.width, bias=bias)
        with_branches = widths if self.method.branches else ()
        self.branch_heads = nn.ModuleList(mlp(hidden + latent, hidden, task.width, bias=bias) for _ in with_branches)

    def forward(self, batch: Mapping[str, Tensor], *, warm_up: bool = False) -> Output:
        """Noise is drawn in training mode alone; otherwise a code is its mean, and e of the warm-up is 0."""
        z = [encode(batch[f"view_{i}"]) for i, encode in enumerate(self.encoders)]
        if warm_up:
            e = z[0].new_zeros(len(z[0]), self.latent)
            return Output(None, self.branch(z, torch.randn_like(e) if self.training else e), ())
        cut = [layer(t).split(self.latent, 1) for layer, t in zip(self.to_code, z, strict=True)]
        each = self.method.bottleneck == "each"
        codes = tuple(Code(parts[0], FIRST_LOG_STD + parts[1]) for parts in cut) if each else ()
        xi = self.attention([code.sample(self.training) for code in codes] if each else [parts[0] for parts in cut])
        if self.method.bottleneck == "fused":
            mean, log_std = xi.chunk(2, 1)
            codes = (Code(mean, FIRST_LOG_STD + log_std),)
            xi = codes[0].sample(self.training)
        return Output(self.head(xi), self.branch(z, xi), codes)

    def branch(self, z: Sequence[Tensor], other: Tensor) -> tuple[Tensor, ...]:
        heads = zip(self.branch_heads, z, strict=bool(len(self.branch_heads)))
        return tuple(head(torch.cat([t, other], 1)) for head, t in heads)
