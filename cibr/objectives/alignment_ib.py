"""Alignment by an information bottleneck (2506.04870): InfoNCE and beta times what keeps the two embeddings together.

    loss = InfoNCE(zv, zt) + beta B
    cosine    B = 1 - cos(zv, zt)                                the paper's published form
    fixed     B = KL(N(zv, s^2) || N(zt, s^2)) = (1 - cos) / s^2, in nats; InfoNCE sees zv + s e, zt + s e'
    learned   B = 1/2 [KL(pv || pt) + KL(pt || pv)], p = N(z, diag sigma(X)^2) by a linear map; InfoNCE sees samples

KL(p(z | xv) || p(z | xt)) bounds I(Zv; Xv | Xt) from above, CIBR's quantity.  `align` has the same bound with CIBR's
weights and warm-up; `ceb` puts a network in the other encoder's place.

InfoNCE: both directions, or as in the paper's code image to text alone.  The temperature is the model's, learnable or
fixed as the logarithm of a scale, or a number tau of the objective's own, learnt as it is and never clamped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cibr_kernels as ck
from cibr.config import option
from cibr.models import Batch, Features, Model, Output
from cibr.objectives.contrastive import Objective

FIRST_TAU = 0.07


@dataclass(frozen=True, kw_only=True)
class AlignmentOptions:
    objective: str = option("aib", "InfoNCE and an information bottleneck on its alignment")
    beta: float = option(0.1, "weight of the bottleneck", least=0)
    bottleneck: Literal["cosine", "fixed", "learned"] = option(
        "cosine", "1 - cos, or a KL of variance fixed or learned"
    )
    noise_std: float = option(0.1, "of Gaussians on the unit-norm embeddings: fixed, or at the start", above=0)
    direction: Literal["symmetric", "image_to_text"] = option("symmetric", "of InfoNCE")
    tau: Literal["model", "raw"] = option("model", "temperature: the model's, or a number learnt without a logarithm")


def gaussian_kl(mean: Tensor, log_std: Tensor, other_mean: Tensor, other_log_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(other_mean, other_std^2)) of diagonal Gaussians, all (n, d) -> (n,) nats."""
    variance = (2 * log_std).exp() + (mean - other_mean).square()
    return (other_log_std - log_std + variance / (2 * (2 * other_log_std).exp()) - 0.5).sum(1)


class AlignmentBottleneck(Objective):
    """Parts besides: "bottleneck" B, "tau", and the geometric means "image_std", "text_std" of learned variances."""

    Options = AlignmentOptions

    def __init__(self, options: AlignmentOptions, model: Model) -> None:
        super().__init__(options, model)
        self.log_std = nn.ModuleDict()
        if options.bottleneck == "learned":
            for name, width in (("image", model.image_width), ("text", model.text_width)):
                layer = nn.Linear(width, model.embed_dim)
                nn.init.zeros_(layer.weight)
                nn.init.constant_(layer.bias, math.log(options.noise_std))
                self.log_std[name] = layer
            self.standardize_image = ck.nn.Standardize(model.image_width)
            self.standardize_text = ck.nn.Standardize(model.text_width)
        if options.tau == "raw":
            self.tau = nn.Parameter(torch.tensor(FIRST_TAU))

    def forward(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """-> "loss" and its parts in nats, and the standard deviations or tau where they are learnt."""
        zv, zt = output.image.embedding, output.text.embedding
        parts: dict[str, Tensor] = {}
        if self.options.bottleneck == "learned":
            stds = self.spread("image", output.image), self.spread("text", output.text)
            nats = (gaussian_kl(zv, stds[0], zt, stds[1]) + gaussian_kl(zt, stds[1], zv, stds[0])) / 2
            parts |= {f"{name}_std": std.detach().mean().exp() for name, std in zip(self.log_std, stds, strict=True)}
            seen = self.sample(zv, stds[0].exp()), self.sample(zt, stds[1].exp())
        else:
            nats, seen = (zv - zt).square().sum(1) / 2, (zv, zt)  # 1 - cos
            if self.options.bottleneck == "fixed":
                s = self.options.noise_std
                nats, seen = nats / s**2, (self.sample(zv, s), self.sample(zt, s))
        scale = 1 / self.tau if self.options.tau == "raw" else output.logit_scale
        contrastive = ck.clip_loss(
            *seen,
            scale,
            group_ids=batch.get("group_ids"),
            one_way=self.options.direction == "image_to_text",
            process_group=self.shards,
        )
        bound = nats.mean() if self.shards is None else nats.mean() * self.shards.share
        parts |= {"contrastive_loss": contrastive.detach(), "bottleneck": bound.detach(), "tau": (1 / scale).detach()}
        return {"loss": contrastive + self.options.beta * bound, **parts}

    def spread(self, name: str, features: Features) -> Tensor:
        """log sigma(X) (n, d); encoders do not move by it."""
        standardize = self.standardize_image if name == "image" else self.standardize_text
        return self.log_std[name](standardize(features.inputs.detach(), self.shards))

    def sample(self, z: Tensor, std: Tensor | float) -> Tensor:
        """z (n, d) and noise, of unit norm again; in training alone.  The number of ranks does not change the noise."""
        if not self.training:
            return z
        total, first = (len(z), 0) if self.shards is None else (self.shards.total, self.shards.offset)
        noise = torch.randn(total, z.shape[1], device=z.device)[first : first + len(z)]
        return F.normalize(z + std * noise, dim=1)
