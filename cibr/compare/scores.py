"""What one model does on one test set, unit by unit: a unit is a class, or an image with its captions.

sets of classes    top1, top5 (images among the set's classes), text_to_image@1 (the class among the images)
captioned sets     image_to_text@k, text_to_image@k
both               nuisance: what share of the variance of Z is within a class (of images) or an image (of captions)
drawings           style_neighbours: of the ten nearest drawings of other concepts, per cent in the same style
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cibr.evaluate.encode import encode_captions, encode_classes
from cibr.evaluate.probes import same_style_neighbours, within_class_share
from cibr.evaluate.report import Set
from cibr.evaluate.retrieval import DEPTHS, ranks
from cibr.models import Model

ROWS = 3000  # of the neighbours: memory is their square


@dataclass(frozen=True)
class Scores:
    units: list[str]  # names, that tell a unit from the others of the pool
    hits: dict[str, np.ndarray]  # by metric (u,): questions answered right
    asked: dict[str, np.ndarray]  # (u,)
    nuisance: dict[str, float]  # per cent, of the whole set

    def percent(self) -> dict[str, float]:
        """Every metric of the set as one number."""
        shares = {name: 100 * float(hits.sum() / self.asked[name].sum()) for name, hits in self.hits.items()}
        return {**shares, **self.nuisance}


@torch.no_grad()
def score(model: Model, chosen: Set) -> Scores:
    """The model is in evaluation mode.  Raises UsageError for a set that holds nothing to ask about."""
    images = chosen.images(model)
    z, dataset = images.features.embedding, chosen.dataset
    if dataset.labels is not None and dataset.class_names is not None:
        labels, classes = chosen.labels(model), encode_classes(model, dataset)
        number = torch.arange(len(classes))
        to_text, to_image = ranks(z, labels, classes, number), ranks(classes, number, z, labels)
        found = {"top1": (to_text < 1, labels), "top5": (to_text < 5, labels)}
        found["text_to_image@1"] = (to_image == 0, number)
        return gathered(list(dataset.class_names), found, nuisances(z, labels, chosen.styles(model)))
    captions, row = encode_captions(model, dataset, images.rows)
    number, of = torch.arange(len(images.rows)), torch.searchsorted(images.rows, row)
    to_text, to_image = ranks(z, number, captions, of), ranks(captions, of, z, number)
    found = {f"image_to_text@{k}": (to_text < k, number) for k in DEPTHS}
    found |= {f"text_to_image@{k}": (to_image < k, of) for k in DEPTHS}
    keys = [dataset.keys[k] for k in images.rows.tolist()]
    return gathered(keys, found, nuisances(captions, of, None))


def gathered(units: list[str], found: dict[str, tuple[Tensor, Tensor]], nuisance: dict[str, float]) -> Scores:
    """Answers (q,) bool and the units (q,) that they are about -> sums by unit."""
    hits = {name: torch.bincount(of, right.double(), len(units)).numpy() for name, (right, of) in found.items()}
    asked = {name: torch.bincount(of, minlength=len(units)).numpy() for name, (_, of) in found.items()}
    return Scores(units, hits, asked, nuisance)


def nuisances(z: Tensor, labels: Tensor, styles: Tensor | None) -> dict[str, float]:
    """What Z (n, d) holds besides its label (n,), in per cent; nothing where every row is a class of its own."""
    if len(labels) <= int(labels.max()) + 1 or not (z != z[0]).any():
        return {}
    found = {"nuisance": 100 * within_class_share(z, labels)}
    if styles is not None and len(styles.unique()) > 1:
        rows = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[:ROWS]
        found["style_neighbours"] = same_style_neighbours(z[rows], labels[rows], styles[rows])["same_style"]
    return found
