"""CLIP's and SigLIP's losses over the rows of all ranks; pairs of one group are no negatives of each other.

Two more see as much data as the penalties that need it, and are their controls:

    clip2     (CLIP(zv, zt) + CLIP(zv', zt')) / 2     another image and another caption of each row's class or concept
    meanpos   (CLIP(zv, zt) + CLIP(zv, zt*)) / 2      zt* the normalised mean over all captions of the row
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

import cibr_kernels as ck
from cibr.config import option
from cibr.errors import UsageError
from cibr.models import Batch, Features, Model, Output
from cibr.needs import SECOND, Needs

NAMES = "clip, siglip, clip2, meanpos, cibr, align, ceb, variance"


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    objective: str = option("clip", NAMES)
    label_smoothing: float = option(0.0, "of the softmax's targets", least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class SigLipOptions:
    objective: str = option("siglip", NAMES)


@dataclass(frozen=True, kw_only=True)
class Clip2Options(ClipOptions):
    objective: str = option("clip2", NAMES)


@dataclass(frozen=True, kw_only=True)
class MeanPosOptions(ClipOptions):
    objective: str = option("meanpos", NAMES)


@dataclass(frozen=True, kw_only=True)
class EitherOptions:
    """Of an objective that adds a penalty to one of these."""

    contrastive: Literal["clip", "siglip", "clip2", "meanpos"] = option("clip", "the loss that the penalty is added to")
    label_smoothing: float = option(0.0, "of the softmax's targets; not of siglip", least=0, below=1)


class Objective(nn.Module):
    """Called with a model's output and the batch it came from -> the parts of the loss by name, 0-d.

    "loss" carries the gradient, the others are for the log.  Its parameters, if any, are critics.
    shards: set where there are several ranks; "loss" is then this rank's part, whose mean over ranks is the whole's.
    mark: called with "critics" and "loss" when work on the one or the other begins, for the log's shares of time.
    """

    Options: type = ClipOptions
    shards: ck.distributed.Shards | None = None
    mark: Callable[[str], None] = staticmethod(lambda phase: None)

    def __init__(self, options: Any, model: Model) -> None:
        super().__init__()
        self.options = options

    @classmethod
    def sigmoid(cls, options: Any) -> bool:
        """Whether logits want a bias, and to begin as SigLIP's do."""
        return False

    @classmethod
    def needs(cls, options: Any) -> Needs:
        """What a training batch has besides an image and a caption a row; evaluation gives these alone."""
        return Needs()

    def forward(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def warning(self, means: Mapping[str, float], rows: int) -> str:
        """What somebody who reads these entries of the log should know, of batches of `rows`; "" for nothing."""
        return ""


class Clip(Objective):
    def forward(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        loss = self.clip(output.image, output.text, output, batch.get("group_ids"))
        return {"loss": loss, "contrastive_loss": loss.detach()}

    def clip(self, image: Features, text: Features, output: Output, group_ids: Tensor | None) -> Tensor:
        return ck.clip_loss(
            image.embedding,
            text.embedding,
            output.logit_scale,
            output.logit_bias,
            group_ids=group_ids,
            label_smoothing=self.options.label_smoothing,
            process_group=self.shards,
        )


class Twice(Clip):
    """The mean of CLIP's loss and the same of other features; in evaluation, which has none, CLIP's."""

    def again(self, output: Output, batch: Batch) -> Tensor | None:
        """CLIP's loss of the other features, where a batch has them."""
        raise NotImplementedError

    def forward(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        found, more = super().forward(output, batch), self.again(output, batch)
        return found if more is None else {**found, "loss": (found["loss"] + more) / 2}


class Clip2(Twice):
    Options = Clip2Options

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(second=True)

    def again(self, output: Output, batch: Batch) -> Tensor | None:
        if output.image_2 is None or output.text_2 is None:
            return None
        return self.clip(output.image_2, output.text_2, output, batch.get("group_ids" + SECOND))


class MeanPos(Twice):
    Options = MeanPosOptions

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(captions=True)

    def again(self, output: Output, batch: Batch) -> Tensor | None:
        if output.captions is None:
            return None
        return self.clip(output.image, output.captions, output, batch.get("group_ids"))


class SigLip(Objective):
    Options = SigLipOptions

    @classmethod
    def sigmoid(cls, options: Any) -> bool:
        return True

    def forward(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        loss = ck.siglip_loss(
            output.image.embedding,
            output.text.embedding,
            output.logit_scale,
            output.logit_bias,
            group_ids=batch.get("group_ids"),
            process_group=self.shards,
        )
        return {"loss": loss, "contrastive_loss": loss.detach()}


CONTRASTIVE: dict[str, type[Objective]] = {"clip": Clip, "siglip": SigLip, "clip2": Clip2, "meanpos": MeanPos}


def contrastive(options: EitherOptions, model: Model) -> Objective:
    """The contrastive part of an objective with a penalty.  Raises UsageError for smoothing without a softmax."""
    kind = CONTRASTIVE[options.contrastive]
    if options.contrastive == "siglip":
        if options.label_smoothing:
            raise UsageError("--label-smoothing is of a softmax's targets, and --contrastive siglip has none")
        return kind(SigLipOptions(), model)
    return kind(kind.Options(label_smoothing=options.label_smoothing), model)
