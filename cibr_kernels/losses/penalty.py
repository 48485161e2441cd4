"""The redundancy I(Zv; Xv | Xt) + I(Zt; Xt | Xv), by critics or by an upper bound in closed form, with its players.

    mine ... infonce    I(Z; own) - I(Z; condition)         four critics, each maximises its own term
    ceb                 |z - m(condition)|^2 / 2 s^2        two networks, each minimises its own bound
    variance            |z - z'|^2 / 4 s^2                  z' of a second x with the same condition; or in groups
    align               |zv - zt|^2 / 2 s^2                 the other embedding stands for m

Ideal critics and the ideal m are after one gradient, (z - E[z | condition]) / s^2; critics need far longer to find it.

A penalty returns a surrogate whose gradient is every player's.  `branch` holds the features as encoders pay for them:
their gradient is scaled by lam already, critics' and networks' is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cibr_kernels import checks
from cibr_kernels.dispatch import library
from cibr_kernels.distributed import merge
from cibr_kernels.distributed.shards import Shards
from cibr_kernels.information import bounds, gaussian
from cibr_kernels.information.bounds import BOUNDS
from cibr_kernels.information.critics import View
from cibr_kernels.information.estimators import MAXIMISED, UPPER, Ema, estimate
from cibr_kernels.information.group import Group, ScaledGradient, grouped_moments, weights_of_all
from cibr_kernels.information.negatives import Negatives
from cibr_kernels.information.pairs import Pairs
from cibr_kernels.losses.scatter import variance_in_groups
from cibr_kernels.numerics import WIDE, promote

TERMS = {  # the critics, and what each of them sees
    "image_own": ("image_inputs", "image_features"),
    "image_other": ("text_condition", "image_features"),
    "text_own": ("text_inputs", "text_features"),
    "text_other": ("image_condition", "text_features"),
}
MEANS = {  # ceb's networks: what each reads, and the embedding whose mean it predicts
    "image_mean": ("text_condition", "image_features"),
    "text_mean": ("image_condition", "text_features"),
}
PENALTIES = (*MAXIMISED, *UPPER)
MODALITIES = ("image", "text")

Players = Mapping[str, Any] | nn.ModuleDict


def players(estimator: str) -> Mapping[str, tuple[str, str]]:
    """The names of an estimator's critics or networks, and what each reads."""
    return TERMS if estimator in MAXIMISED else MEANS if estimator == "ceb" else {}


@dataclass(frozen=True)
class Rows:
    """One batch, a row a pair.  Features (n, d); inputs and conditions (n, any), data; a condition stands for X."""

    image_features: Tensor
    text_features: Tensor
    image_inputs: Tensor | None = None
    text_inputs: Tensor | None = None
    image_condition: Tensor | None = None  # what the text's term is conditioned on; the inputs where None
    text_condition: Tensor | None = None
    image_features2: Tensor | None = None  # second views
    text_features2: Tensor | None = None
    group_ids: Tensor | None = None

    def read(self, names: Iterable[str]) -> dict[str, tuple[str, Tensor | None]]:
        """The tensors that go by names of TERMS or MEANS, each with the name under which the caller gave it."""
        found = {}
        for name in names:
            stands = name.endswith("_condition") and getattr(self, name) is None
            given = name.replace("_condition", "_inputs") if stands else name
            found[name] = given, getattr(self, given)
        return found

    def features(self) -> dict[str, Tensor]:
        """The embeddings that were given, second views among them."""
        names = ("image_features", "text_features", "image_features2", "text_features2")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def scaled(self, lam: Tensor | float) -> Rows:
        """The same with float32 (float64) features whose gradient is multiplied by lam."""
        scaled = {}
        for name, z in self.features().items():
            scaled[name] = scale_gradient(z if z.dtype in WIDE else promote(z), lam)
        return replace(self, **scaled)


@dataclass(frozen=True)
class Options:
    """How a penalty is estimated and what stands around it.  Raises as `cibr_loss` says."""

    estimator: str = "mine"
    negatives: Negatives = "all"
    diagonal: str = "exclude"
    noise_std: float = 0.25
    one_way: bool = False
    strategy: str = "gather"

    def check_noise(self) -> None:
        checks.number("noise_std", self.noise_std)
        if self.noise_std < 0:
            raise ValueError(f"noise_std must not be negative, got {self.noise_std}")
        if self.noise_std == 0 and self.estimator in UPPER:
            raise ValueError(
                f"estimator {self.estimator!r} needs noise_std > 0 (without noise it is infinite), got {self.noise_std}"
            )


def scale_gradient(z: Tensor, factor: Tensor | float) -> Tensor:
    """The value of z with `factor` times its gradient."""
    if library.only_autograd_looks_on(z):
        return ScaledGradient.apply(z, factor)  # type: ignore[no-any-return]
    return z.detach() + factor * (z - z.detach())


def noisy(
    z: Tensor, noise_std: float, generator: torch.Generator | None = None, shards: Shards | None = None
) -> Tensor:
    """(z + noise_std * standard normal) * sqrt(d), float32: what the critics see of a unit-norm z (n, d).

    With `shards` each rank draws the noise of the whole batch and takes its rows: ranks seeded alike get what a single
    process would draw, ranks seeded differently independent noise.
    """
    z = z if z.dtype in WIDE else promote(z)
    n, d = z.shape
    total, first = (n, 0) if shards is None else (shards.total, shards.offset)
    drawn: dict[str, Any] = {} if generator is None else {"generator": generator}  # refused beside a symbolic size
    noise = torch.randn((total, d), dtype=z.dtype, device=z.device, **drawn)[first : first + n]
    return (z + noise_std * noise) * math.sqrt(d)


def penalty(
    branch: Rows,
    options: Options,
    players: Mapping[str, Any],
    *,
    ema: Mapping[str, Ema] | nn.ModuleDict | None = None,
    generator: torch.Generator | None = None,
    shards: Shards | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """-> the surrogate (), and "image_cmi", "text_cmi" and what they are made of, detached nats.  Outside of autocast.

    players: views of the critics, or ceb's networks.
    """
    if options.estimator in MAXIMISED:
        return _by_critics(branch, options, players, ema, generator, shards, backend)
    if options.estimator == "ceb":
        upper = [_by_network(branch, name, options, players[name], shards) for name in MEANS]
    elif options.estimator == "variance":
        upper = [_by_variance(branch, modality, options, shards) for modality in MODALITIES]
    else:
        aligned = gaussian.align(branch.image_features, branch.text_features, options.noise_std)
        upper = [_mean(aligned, shards)] * 2
    return upper[0] + upper[1], {"image_cmi": upper[0].detach(), "text_cmi": upper[1].detach()}


def _by_critics(
    branch: Rows,
    options: Options,
    critics: Mapping[str, View],
    ema: Mapping[str, Ema] | nn.ModuleDict | None,
    generator: torch.Generator | None,
    shards: Shards | None,
    backend: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the sum of the four estimates, where Z's gradient has the other sign in `own`."""
    tensors = {
        f"{modality}_features": noisy(getattr(branch, f"{modality}_features"), options.noise_std, generator, shards)
        for modality in MODALITIES
    }
    nats = None
    if shards is None and options.negatives == "all" and options.estimator in BOUNDS and backend != "reference":
        nats = _together(branch, options, critics, tensors, ema, backend)
    if nats is None:
        nats = _one_by_one(branch, options, critics, tensors, ema, shards, backend)
    each = nats.detach()
    own, other = each.view(2, 2).unbind(1)
    parts = {f"{m}_cmi": cmi for m, cmi in zip(MODALITIES, (own - other).unbind(0), strict=True)}
    return -nats.sum(), parts | dict(zip(TERMS, each.unbind(0), strict=True))


def _one_by_one(
    branch: Rows,
    options: Options,
    critics: Mapping[str, View],
    tensors: Mapping[str, Tensor],
    ema: Mapping[str, Ema] | nn.ModuleDict | None,
    shards: Shards | None,
    backend: str,
) -> Tensor:
    """The estimates of any four critics, (4,), in the order of TERMS."""
    nats = []
    data = _data(branch, (x for x, _ in TERMS.values()), next(iter(tensors.values())))
    for name, (x, z) in TERMS.items():
        seen = tensors[z]
        pairs = Pairs(
            data[x],
            scale_gradient(seen, -1.0) if name.endswith("own") else seen,
            None,
            critics[name],
            options.negatives,
            options.diagonal == "include",
            shards,
            "gather",
            backend,
        )
        nats.append(estimate(pairs, options.estimator, None if ema is None else ema[name], {}))
    return torch.stack(nats)


def _together(
    branch: Rows,
    options: Options,
    critics: Mapping[str, View],
    tensors: Mapping[str, Tensor],
    ema: Mapping[str, Ema] | nn.ModuleDict | None,
    backend: str,
) -> Tensor | None:
    """The same of concat critics of one shape, as one node of autograd; None where one has to be called."""
    zs = [tensors[f"{modality}_features"] for modality in MODALITIES]
    weights = weights_of_all([critics[name] for name in TERMS], *zs)
    if weights is None:
        return None
    inner = critics["image_own"].inner
    group = Group((0, 0, 1, 1), (-1.0, 1.0) * 2, inner.activation, inner.slope, options.diagonal == "include", backend)
    data = _data(branch, (x for x, _ in TERMS.values()), zs[0])
    j, el = grouped_moments([*data.values()], zs, weights, group)
    if ema is None:
        return bounds.value(j, el, options.estimator)
    each = zip(TERMS, j.unbind(0), el.unbind(0), strict=True)
    return torch.stack([bounds.value(j_k, el_k, options.estimator, ema=ema[name]) for name, j_k, el_k in each])


def _by_network(branch: Rows, name: str, options: Options, network: Any, shards: Shards | None) -> Tensor:
    y, features = MEANS[name]
    z = getattr(branch, features)
    return _mean(gaussian.ceb(z, _data(branch, (y,), z)[y], network, options.noise_std, name=name), shards)


def _by_variance(branch: Rows, modality: str, options: Options, shards: Shards | None) -> Tensor:
    """Of the two views, or else in groups; 0 for a modality that has neither."""
    z, second = getattr(branch, f"{modality}_features"), getattr(branch, f"{modality}_features2")
    if second is not None:
        return _mean(gaussian.variance(z, second, options.noise_std), shards)
    if branch.group_ids is None:
        return z.sum() * 0.0
    return variance_in_groups(z, branch.group_ids, options.noise_std, shards)


def _data(rows: Rows, names: Iterable[str], like: Tensor) -> dict[str, Tensor]:
    """Inputs or conditions without gradient, in the dtype of the features; what stands for two is one tensor."""
    read = rows.read(names)
    made: dict[str, Tensor] = {}
    for given, t in read.values():
        if given not in made:
            assert t is not None
            made[given] = checks.usable(t.detach()).to(like.dtype)
    return {name: made[given] for name, (given, _) in read.items()}


def _mean(nats: Tensor, shards: Shards | None) -> Tensor:
    return nats.mean() if shards is None else merge.mean(nats, shards)
