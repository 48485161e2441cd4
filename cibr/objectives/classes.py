"""Cross-entropy over all classes, whose prompts the model has: what CoOp and MaPLe minimise.

loss = -mean_i log softmax_c(scale <x_i, t_c>)[label_i]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cibr.config import option
from cibr.errors import UsageError
from cibr.models import Batch, Model, Output
from cibr.objectives.contrastive import Objective


@dataclass(frozen=True, kw_only=True)
class ClassesOptions:
    objective: str = option("classes", "cross-entropy over the classes, of coop and maple")
    label_smoothing: float = option(0.0, "of the softmax's targets", least=0, below=1)


class Classes(Objective):
    """`output.text` has a row for each class; `batch["group_ids"]` (n,) are the labels."""

    Options = ClassesOptions

    def __init__(self, options: ClassesOptions, model: Model) -> None:
        super().__init__(options, model)
        if model.objective != "classes":
            raise UsageError(
                "--objective classes is of models with prompts of their own: --model coop:BASE, maple:BASE"
            )

    def forward(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        labels = batch.get("group_ids")
        if labels is None and "index" in batch:
            raise UsageError("--objective classes takes a row's class from its group: leave --mask-duplicates on")
        if labels is None:  # pairs of a validation, no two of a class: row i is of class i
            labels = torch.arange(len(output.image.embedding), device=output.image.embedding.device)
        logits = output.logit_scale * output.image.embedding @ output.text.embedding.T
        loss = F.cross_entropy(logits, labels, label_smoothing=self.options.label_smoothing)
        right = (logits.argmax(1) == labels).float().mean()
        return {"loss": loss, "accuracy": 100 * right.detach()}
