"""CIBR (2503.24182): each conditional information is a difference of two, by a critic each.

I(Z; own | other) = I(own; Z) - I(other; Z)                 markov: Z is computed from its own X, so this is exact
                  = I([own, other]; Z) - I(other; Z)        chain
                  = I(own; [Z, other]) - I(own; other)      joint: the second does not depend on Z
surrogate         = - sum of the estimates, with -lam times Z's gradient in the first and lam times in the second
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import cibr_kernels as ck
from cibr.config import option
from cibr.errors import UsageError
from cibr.models import Model, Output
from cibr.objectives.contrastive import NAMES
from cibr.objectives.penalty import Conditioned, ConditionOptions, scaled
from cibr_kernels.information.capacity import capacity, covariance

TERMS = ("image_own", "image_other", "text_own", "text_other")


@dataclass(frozen=True, kw_only=True)
class CibrOptions(ConditionOptions):
    objective: str = option("cibr", NAMES)
    estimator: Literal["mine", "dv", "nwj", "tuba", "remine", "js", "smile", "infonce"] = option(
        "mine", "of information"
    )
    decomposition: Literal["markov", "chain", "joint"] = option(
        "markov", "of each conditional information into a difference of two"
    )
    critic: Literal["concat", "separable"] = option("concat", "one hidden layer on [x, z], or <f(x), g(z)>")
    critic_hidden: int = option(512, "hidden units of each critic", least=1)
    critic_activation: Literal["relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "elu", "softplus", "tanh"] = option(
        "relu", "of concat critics"
    )
    negatives: str = option("all", "pairs for the product of marginals: all, shifts:K, derangement:K or permutation:K")
    diagonal: Literal["exclude", "include"] = option("exclude", "whether a pair is also its own negative")
    remine_rho: float = option(0.1, "of --estimator remine: weight of its regulariser", least=0)
    remine_c: float = option(0.0, "of --estimator remine: where it holds the log-mean-exp")
    smile_tau: float = option(5.0, "of --estimator smile: scores are clamped to [-tau, tau]", above=0)
    ema_decay: float | None = option(
        None, "MINE's moving average; default none, for which all pairs need none", below=1
    )


class Cibr(Conditioned):
    Options = CibrOptions

    def __init__(self, options: CibrOptions, model: Model) -> None:
        super().__init__(options, model)
        if options.ema_decay is not None and options.estimator != "mine":
            raise UsageError(f"--ema-decay belongs to --estimator mine, not {options.estimator}")
        image = self._widths(model.image_width, model.text_width, model.embed_dim)
        text = self._widths(model.text_width, model.image_width, model.embed_dim)
        critics = zip(TERMS, (*image, *text), strict=True)
        self.critics = nn.ModuleDict({name: self._critic(*widths) for name, widths in critics})
        self.ema = nn.ModuleDict()
        if options.ema_decay is not None:
            self.ema.update({name: ck.nn.LogEMA(options.ema_decay) for name in TERMS})
        self.negatives = parse_negatives(options.negatives)
        remine, smile = {"rho": options.remine_rho, "c": options.remine_c}, {"tau": options.smile_tau}
        self.estimator_options: dict[str, Any] = {"remine": remine, "smile": smile}.get(options.estimator, {})

    def _widths(self, own: int, other: int, z: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of what the critics of `pair`'s two terms compare."""
        chosen = self.options.decomposition
        if chosen == "joint":
            return (own, z + other), (own, other)
        return (own + other if chosen == "chain" else own, z), (other, z)

    def _critic(self, width: int, other_width: int) -> nn.Module:
        options = self.options
        if options.critic == "separable":
            return ck.nn.SeparableCritic(width, other_width, options.critic_hidden)
        return ck.nn.ConcatCritic(width, other_width, options.critic_hidden, activation=options.critic_activation)

    def penalty(self, output: Output, lam_image: Tensor, lam_text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        xv, xt, captions = self.inputs(output)
        zv, zt = self.noisy(output.image.embedding), self.noisy(output.text.embedding)
        compared = (*self.pair(xv, captions, zv, lam_image), *self.pair(xt, xv, zt, lam_text))
        nats = {name: self.information(name, *ends) for name, ends in zip(TERMS, compared, strict=True)}
        parts = {name: value.detach() for name, value in nats.items()}
        parts["image_cmi"] = parts["image_own"] - parts["image_other"]
        parts["text_cmi"] = parts["text_own"] - parts["text_other"]
        for tower, features in (("image", output.image), ("text", output.text)):
            parts[f"{tower}_capacity"] = capacity(covariance(features.embedding), self.options.noise_std)
        return -torch.stack(list(nats.values())).sum(), parts

    def pair(self, own: Tensor, other: Tensor, z: Tensor, lam: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What the two terms of I(Z; own | other) compare, (n, .) each, Z's gradient scaled."""
        less, more = scaled(z, -lam), scaled(z, lam)
        if self.options.decomposition == "joint":
            return [(own, torch.cat([less, other], 1)), (own, other)]
        first = torch.cat([own, other], 1) if self.options.decomposition == "chain" else own
        return [(first, less), (other, more)]

    def warning(self, means: Mapping[str, float], rows: int) -> str:
        if "image_own" not in means:
            return ""
        limit = math.log(rows) - 1
        highest = max(TERMS, key=lambda name: means[name])
        if (
            self.options.estimator == "js"
            or max(means[highest], means["image_capacity"], means["text_capacity"]) < limit
        ):
            return ""
        return (
            f"critics can tell up to about log(n) - 1 = {limit:.1f} nats in batches of {rows}. {highest} is estimated "
            f"at {means[highest]:.1f}, and the embeddings can carry {means['image_capacity']:.1f} (image) and "
            f"{means['text_capacity']:.1f} (text): what is above is not seen; a larger batch or --noise-std helps"
        )

    def noisy(self, z: Tensor) -> Tensor:
        """What critics see of a unit-norm z (n, d): noise added, entries of order 1."""
        return (z + self.noise(z)) * math.sqrt(z.shape[1])

    def information(self, name: str, x: Tensor, z: Tensor) -> Tensor:
        return ck.mutual_information(
            x,
            z,
            self.critics[name],
            estimator=self.options.estimator,
            negatives=self.negatives,
            diagonal=self.options.diagonal,
            ema=self.ema[name] if len(self.ema) else None,
            process_group=self.shards,
            **self.estimator_options,
        )


def parse_negatives(text: str) -> Any:
    """`shifts:4` -> cibr_kernels.shifts(4).  Raises UsageError for what is none of the four."""
    makers: dict[str, Any] = {"shifts": ck.shifts, "derangement": ck.derangement, "permutation": ck.permutation}
    kind, _, count = text.partition(":")
    if text == "all":
        return text
    if kind not in makers or not count.isdecimal() or int(count) < 1:
        raise UsageError(f"--negatives is {text!r}, but must be all, or shifts:K, derangement:K or permutation:K")
    return makers[kind](int(count))
