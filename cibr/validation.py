"""What a model does on data it does not learn from, while it learns: the loss and its parts, retrieval, zero-shot."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from cibr.config import RunConfig
from cibr.evaluate.encode import device_of, encode_pairs
from cibr.evaluate.report import Set, score_classes, score_retrieval, use_prompts, validation_set
from cibr.models import Features, Model, Output
from cibr.objectives import Objective


class Validation:
    """Calls evaluate the whole of one set, the same rows in the same batches each time."""

    def __init__(self, config: RunConfig) -> None:
        self.set = validation_set(config)
        self.batch_size = config.optim.batch_size
        if self.set.dataset.class_names is not None:
            use_prompts("val", self.set.dataset)

    @torch.no_grad()
    def __call__(self, model: Model, objective: Objective) -> dict[str, Any]:
        """{"loss": ..., its parts, "retrieval": {"val": ...}, "zero_shot": {"val": ...} where there are classes}."""
        chosen = copy.copy(self.set)  # which keeps what it has encoded
        with at_rest(model, objective):
            report: dict[str, Any] = self.losses(model, objective, chosen)
            if chosen.dataset.labels is not None:
                report["zero_shot"] = {"val": score_classes(model, chosen)}
            return {**report, "retrieval": {"val": score_retrieval(model, chosen)}}

    def losses(self, model: Model, objective: Objective, chosen: Set) -> dict[str, float]:
        """Means over batches of the training's size; over one of all pairs where there are fewer."""
        images = chosen.images(model)
        pairs = encode_pairs(model, chosen.dataset, images, len(images.rows))
        total, device = len(pairs[0].embedding), device_of(model)
        size = min(self.batch_size, total)
        sums: dict[str, float] = {}
        for first in range(0, total - size + 1, size):
            rows = slice(first, first + size)
            image, text = (Features(f.inputs[rows].to(device), f.embedding[rows].to(device)) for f in pairs)
            for name, value in objective(Output(image, text, *model.logits()), {}).items():
                sums[name] = sums.get(name, 0.0) + value.item() / (total // size)
        return sums


@contextlib.contextmanager
def at_rest(model: Model, objective: Objective) -> Iterator[None]:
    """Both in evaluation mode, and every rank for itself, meanwhile."""
    training, shards = model.training, objective.shards
    model.eval()
    objective.eval()
    objective.shards = None
    try:
        yield
    finally:
        model.train(training)
        objective.train(training)
        objective.shards = shards


def quality(report: dict[str, Any]) -> float:
    """By which the best checkpoint is chosen: the mean of R@1 both ways."""
    marks = report["retrieval"]["val"]
    return (marks["image_to_text@1"] + marks["text_to_image@1"]) / 2
