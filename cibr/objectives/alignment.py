"""Upper bounds on the conditional information, in closed form and without an adversary: O(n d).

    align      |zv - zt|^2 / 2 s^2           the other embedding stands for E[z | other]  (2506.04870: (1 - cos) / s^2)
    ceb        |z - m(x_other)|^2 / 2 s^2    a network m learns that mean, descending on the same bound  (2002.05379)
    variance   |z - z'|^2 / 4 s^2            z' of another image, or caption, of the same class or concept: in the mean
                                             the trace of Cov(z | concept) / 2 s^2, which needs no network

s is the noise on the embeddings.  Where rows of one other x have several own ones, ceb's minimum is the variance of z
given that x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cibr.config import option
from cibr.models import Features, Model, Output
from cibr.needs import Needs
from cibr.objectives.contrastive import NAMES
from cibr.objectives.penalty import Conditioned, ConditionOptions, Penalised, PenaltyOptions, scaled


@dataclass(frozen=True, kw_only=True)
class AlignOptions(PenaltyOptions):
    objective: str = option("align", NAMES)


@dataclass(frozen=True, kw_only=True)
class CebOptions(ConditionOptions):
    objective: str = option("ceb", NAMES)
    critic_hidden: int = option(512, "hidden units of each mean network", least=1)


@dataclass(frozen=True, kw_only=True)
class VarianceOptions(PenaltyOptions):
    objective: str = option("variance", NAMES)
    contrastive: Literal["clip", "siglip", "clip2", "meanpos"] = option(
        "clip2", "the loss that the penalty is added to"
    )


class Align(Penalised):
    Options = AlignOptions

    def penalty(self, output: Output, lam_image: Tensor, lam_text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        both = (lam_image + lam_text) / 2  # the bound is the same both ways
        zv, zt = scaled(output.image.embedding, both), scaled(output.text.embedding, both)
        nats = self.bound("align", zv, output.image.inputs, zt)
        return 2 * nats, {"image_cmi": nats.detach(), "text_cmi": nats.detach()}


class Ceb(Conditioned):
    Options = CebOptions

    def __init__(self, options: CebOptions, model: Model) -> None:
        super().__init__(options, model)
        self.image_mean, self.text_mean = (
            nn.Sequential(
                nn.Linear(width, options.critic_hidden), nn.ReLU(), nn.Linear(options.critic_hidden, model.embed_dim)
            )
            for width in (model.text_width, model.image_width)
        )

    def penalty(self, output: Output, lam_image: Tensor, lam_text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        xv, xt, captions = self.inputs(output)
        image = self.bound("ceb", scaled(output.image.embedding, lam_image), xv, captions, self.image_mean)
        text = self.bound("ceb", scaled(output.text.embedding, lam_text), xt, xv, self.text_mean)
        return torch.add(image, text), {"image_cmi": image.detach(), "text_cmi": text.detach()}


class Variance(Penalised):
    Options = VarianceOptions

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return super().needs(options) | Needs(second=True)

    def penalty(self, output: Output, lam_image: Tensor, lam_text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """0 without a second image and caption, in evaluation."""
        image = self.scatter(output.image, output.image_2, lam_image)
        text = self.scatter(output.text, output.text_2, lam_text)
        return torch.add(image, text), {"image_cmi": image.detach(), "text_cmi": text.detach()}

    def scatter(self, one: Features, other: Features | None, lam: Tensor) -> Tensor:
        """The mean of |z - z'|^2 / 4 s^2 over all ranks' rows, 0-d, with lam times its gradient."""
        if other is None:
            return one.embedding.new_zeros(())
        z, other_z = scaled(one.embedding, lam), scaled(other.embedding, lam)
        return self.bound("variance", z, one.inputs, other_z)
