"""A contrastive loss and lam times what an embedding keeps of its own modality that the other does not know.

    loss = contrastive + lam [ I(Zv; Xv | Xt) + I(Zt; Xt | Xv) ]

One backward serves two players: critics move at their full gradient, encoders at lam times theirs.  So a penalty is
made of terms in which the embedding's gradient is scaled, `scaled(z, lam)`, and the critics' is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cibr_kernels as ck
from cibr.config import option
from cibr.models import Batch, Model, Output
from cibr.needs import Needs
from cibr.objectives.contrastive import CONTRASTIVE, EitherOptions, Objective, contrastive


@dataclass(frozen=True, kw_only=True)
class PenaltyOptions(EitherOptions):
    lam: float = option(0.5, "weight of the penalty", least=0)
    lam_text: float | None = option(None, "weight of the text's term; default --lam", least=0)
    lam_warmup_steps: int = option(50, "steps at weight 0, in which only the critics learn", least=0)
    lam_ramp_steps: int = option(50, "steps in which the weight then grows to --lam", least=0)
    gradient_cap: float | None = option(
        None,
        "largest norm of the penalty's gradient at the embeddings, as a multiple of the contrastive loss's",
        above=0,
    )
    noise_std: float = option(0.25, "noise on the unit-norm embeddings, without which information is infinite", above=0)
    noise_enters: Literal["penalty", "both"] = option(
        "penalty", "what sees the noise: the penalty, or the contrastive loss too, in training, by a draw of its own"
    )


class Penalised(Objective):
    """A subclass defines `penalty`."""

    step: Tensor

    def __init__(self, options: Any, model: Model) -> None:
        super().__init__(options, model)
        self.contrastive = contrastive(options, model)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.growth = ck.nn.Schedule(1.0, options.lam_warmup_steps, options.lam_ramp_steps)

    @classmethod
    def sigmoid(cls, options: Any) -> bool:
        return options.contrastive == "siglip"

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return CONTRASTIVE[options.contrastive].needs(options)

    def lams(self) -> tuple[Tensor, Tensor]:
        """Weights of the image's and the text's term, 0-d: 0 in the warm-up, then linear growth to the options'."""
        grown, lam, lam_text = self.growth.at(self.step), self.options.lam, self.options.lam_text
        return lam * grown, (lam if lam_text is None else lam_text) * grown

    def penalty(self, output: Output, lam_image: Tensor, lam_text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What players descend on, 0-d, and the log's entries, detached: "image_cmi", "text_cmi" (nats) and others."""
        raise NotImplementedError

    def forward(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """-> "loss", 0-d, with the gradient of both players; the other entries are for the log."""
        self.contrastive.shards = self.shards
        found = self.contrastive(self.noised(output), batch)
        loss = found["loss"]
        lam_image, lam_text = self.lams()
        self.mark("critics")
        views = {name: t.view_as(t) for name, t in output.tensors().items()}
        branch = Output.of(views)  # on which a gradient is the penalty's alone
        surrogate, parts = self.penalty(branch, lam_image, lam_text)
        if self.options.gradient_cap is not None and loss.requires_grad and surrogate.requires_grad:
            parts["gradient_ratio"] = self.cap(loss, output, surrogate, branch)
        self.mark("loss")
        for part, phase in ((surrogate, "critics"), (loss, "loss")):  # the backward comes to the later part first
            if part.requires_grad:
                part.register_hook(lambda _, phase=phase: self.mark(phase))
        value = lam_image * parts["image_cmi"] + lam_text * parts["text_cmi"]
        if self.training:
            self.step += 1
        return {
            "loss": loss + value + (surrogate - surrogate.detach()),
            "contrastive_loss": found["contrastive_loss"],
            "lam": lam_image,
            **parts,
        }

    def bound(self, estimator: str, z: Tensor, own: Tensor, other: Tensor, mean: nn.Module | None = None) -> Tensor:
        """An upper bound without an adversary (`cibr_kernels.conditional_mutual_information`), 0-d nats."""
        std = self.options.noise_std
        return ck.conditional_mutual_information(
            z, own, other, mean, estimator=estimator, noise_std=std, process_group=self.shards
        )

    def noised(self, output: Output) -> Output:
        """What the contrastive loss sees: with `noise_enters` "both", in training, normalize(z + noise) for each z."""
        if self.options.noise_enters == "penalty" or not self.training:
            return output
        tensors = output.tensors()
        noisy = {n: F.normalize(z + self.noise(z), dim=1) for n, z in tensors.items() if n.endswith(".embedding")}
        return Output.of({**tensors, **noisy})

    def noise(self, z: Tensor) -> Tensor:
        """(n, d), of the options' deviation.

        Every rank draws the whole batch's noise and takes its rows, so that it does not depend on the number of ranks.
        """
        total, first = (len(z), 0) if self.shards is None else (self.shards.total, self.shards.offset)
        return self.options.noise_std * torch.randn(total, z.shape[1], device=z.device)[first : first + len(z)]

    def cap(self, loss: Tensor, output: Output, surrogate: Tensor, branch: Output) -> Tensor:
        """Holds the penalty's gradient in the backward to come; returns its ratio to the contrastive one, uncapped."""
        ends = ((loss, output), (surrogate, branch))
        norms = []
        for end, at in ends:
            found = torch.autograd.grad(end, embeddings(at), retain_graph=True, allow_unused=True)
            square = torch.stack([g.square().sum() for g in found if g is not None]).sum()
            if self.shards is not None:
                torch.distributed.all_reduce(square, group=self.shards.group)
            norms.append(square.sqrt())
        ratio = norms[1] / norms[0]
        factor = (self.options.gradient_cap / ratio).clamp(max=1.0)
        for z in embeddings(branch):
            z.register_hook(lambda gradient: gradient * factor)
        return ratio


def embeddings(output: Output) -> list[Tensor]:
    """Z of both towers, and of the second views where there are any."""
    return [t for name, t in output.tensors().items() if name.endswith(".embedding")]


def scaled(z: Tensor, factor: Tensor | float) -> Tensor:
    """The value of z with `factor` times its gradient."""
    return z.detach() + factor * (z - z.detach())


@dataclass(frozen=True, kw_only=True)
class ConditionOptions(PenaltyOptions):
    """Of a penalty whose image term asks what the text already says."""

    condition: Literal["one", "all"] = option(
        "one", "what the other modality is to an image: the caption drawn, or the mean of X over all its captions"
    )


class Conditioned(Penalised):
    """Critics or mean networks that see X, and a choice of what an image is conditioned on."""

    def __init__(self, options: Any, model: Model) -> None:
        super().__init__(options, model)
        self.standardize_image = ck.nn.Standardize(model.image_width)
        self.standardize_text = ck.nn.Standardize(model.text_width)
        if options.condition == "all":  # a mean of several varies less than one of them
            self.standardize_captions = ck.nn.Standardize(model.text_width)

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return super().needs(options) | Needs(captions=options.condition == "all")

    def inputs(self, output: Output) -> tuple[Tensor, Tensor, Tensor]:
        """Xv (n, dv), Xt (n, dt) and what an image is conditioned on (n, dt): Xt, or the mean over all captions.

        In evaluation, where there is one caption, it stands for all.
        """
        xv = self.standardize_image(output.image.inputs.detach(), self.shards)
        xt = self.standardize_text(output.text.inputs.detach(), self.shards)
        if self.options.condition == "one":
            return xv, xt, xt
        several = output.text if output.captions is None else output.captions
        return xv, xt, self.standardize_captions(several.inputs.detach(), self.shards)
