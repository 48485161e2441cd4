"""CLIP's and SigLIP's losses over the rows of all ranks; pairs of one group are no negatives of each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

import cibr_kernels as ck
from cibr.config import option
from cibr.models import Batch, Model, Output

NAMES = "clip, siglip, cibr, align, ceb"


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    objective: str = option("clip", NAMES)
    label_smoothing: float = option(0.0, "of the softmax's targets", least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class SigLipOptions:
    objective: str = option("siglip", NAMES)


@dataclass(frozen=True, kw_only=True)
class EitherOptions:
    """Of an objective that adds a penalty to one of the two."""

    contrastive: Literal["clip", "siglip"] = option("clip", "the loss that the penalty is added to")


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

    def forward(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def warning(self, means: Mapping[str, float], rows: int) -> str:
        """What somebody who reads these entries of the log should know, of batches of `rows`; "" for nothing."""
        return ""


class Clip(Objective):
    def forward(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        loss = ck.clip_loss(
            output.image.embedding, output.text.embedding, output.logit_scale, output.logit_bias,
            group_ids=batch.get("group_ids"), label_smoothing=self.options.label_smoothing, process_group=self.shards,
        )  # fmt: skip
        return {"loss": loss, "contrastive_loss": loss.detach()}


class SigLip(Objective):
    Options = SigLipOptions

    @classmethod
    def sigmoid(cls, options: Any) -> bool:
        return True

    def forward(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        loss = ck.siglip_loss(
            output.image.embedding, output.text.embedding, output.logit_scale, output.logit_bias,
            group_ids=batch.get("group_ids"), process_group=self.shards,
        )  # fmt: skip
        return {"loss": loss, "contrastive_loss": loss.detach()}


def contrastive(name: str, model: Model) -> Objective:
    """The contrastive part of an objective with a penalty."""
    return Clip(ClipOptions(), model) if name == "clip" else SigLip(SigLipOptions(), model)
