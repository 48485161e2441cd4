"""From a data set to features: images in order, texts in batches, all on the CPU in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from cibr.data import DataOptions, Dataset, in_order
from cibr.errors import UsageError
from cibr.evaluate.zero_shot import build_classifier
from cibr.models import Features, Model

BATCH_SIZE = 256


@dataclass(frozen=True)
class Images:
    """The images of a data set that could be read."""

    features: Features  # inputs (n, width), embedding (n, d)
    rows: Tensor  # (n,) int64, of the data set


def device_of(model: Model) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def encode_images(model: Model, dataset: Dataset, options: DataOptions) -> Images:
    """Raises UsageError where the model takes no such data or nothing can be read."""
    kind = "cached features" if dataset.image_width else "images"
    if (model.image_key == "image_features") != (dataset.image_width is not None):
        raise UsageError(f"{options.data} holds {kind}, which the model does not take")
    found, rows = [], []
    transform = None if dataset.image_width else model.transform(False)
    batches = in_order(dataset, options, batch_size=BATCH_SIZE, transform=transform)
    for batch in batches:
        found.append(model.encode_image(batch[model.image_key].to(device_of(model))))
        rows.append(batch["index"])
    if not rows:
        raise UsageError(f"no image of {options.data} could be read\n{dataset.skipped}".strip())
    return Images(joined(found), torch.cat(rows))


@torch.no_grad()
def encode_texts(model: Model, texts: Sequence[str] | Tensor) -> Features:
    """Texts through the tokenizer, or features (m, dt) of a frozen tower."""
    starts = tqdm(range(0, len(texts), BATCH_SIZE), desc="texts", unit="batch", leave=False, delay=2, disable=None)
    parts = (texts[k : k + BATCH_SIZE] for k in starts)
    tokens = (part if isinstance(part, Tensor) else model.tokenizer(list(part)) for part in parts)
    return joined([model.encode_text(part.to(device_of(model))) for part in tokens])


def joined(parts: Sequence[Features]) -> Features:
    inputs, embeddings = (
        torch.cat([getattr(p, name).cpu().float() for p in parts]) for name in ("inputs", "embedding")
    )
    return Features(inputs, embeddings)


def encode_captions(model: Model, dataset: Dataset, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (m, d) of every caption of the `rows` (n,) of a data set, and the row of each (m,)."""
    captions = [dataset.captions(row) for row in rows.tolist()]
    of = torch.repeat_interleave(rows, torch.tensor([len(several) for several in captions]))
    return encode_texts(model, concatenated(captions)).embedding, of


def concatenated(captions: Sequence[tuple[str, ...] | Tensor]) -> list[str] | Tensor:
    tensors = [several for several in captions if isinstance(several, Tensor)]
    return torch.cat(tensors) if tensors else [str(text) for several in captions for text in several]


def encode_pairs(model: Model, dataset: Dataset, images: Images, limit: int) -> tuple[Features, Features]:
    """At most `limit` images and the first caption of each, no two of a group, in random order, the same every time."""
    order = torch.randperm(len(images.rows), generator=torch.Generator().manual_seed(0)).tolist()
    groups = dataset.group_ids[images.rows].tolist()
    chosen = list({groups[k]: k for k in order}.values())[:limit]
    first = [dataset.captions(row)[:1] for row in images.rows[chosen].tolist()]
    image = Features(images.features.inputs[chosen], images.features.embedding[chosen])
    return image, encode_texts(model, concatenated(first))


@torch.no_grad()
def encode_classes(model: Model, dataset: Dataset) -> Tensor:
    """(classes, d): the classifier of a data set with classes, by the model's prompts, its own, or cached ones.

    Raises UsageError where there are no class names, or a class of cached features has no row.
    """
    if dataset.labels is None or dataset.class_names is None:
        raise UsageError("the set has no classes, so there is nothing to classify; --retrieval takes captions")
    if (own := model.classifier(dataset.class_names)) is not None:
        return own.cpu().float()
    if not dataset.text_width:
        encode = lambda tokens: model.encode_text(tokens.to(device_of(model))).embedding.cpu().float()  # noqa: E731
        return build_classifier(encode, model.tokenizer, dataset.class_names, dataset.templates or ())
    means = []
    for c, name in enumerate(dataset.class_names):
        row = (dataset.labels == c).nonzero()
        if not len(row):
            raise UsageError(f"the cached features have no row of the class {name!r}, and so none of its prompts")
        means.append(encode_texts(model, dataset.captions(int(row[0]))).embedding.mean(0))  # type: ignore[arg-type]
    return torch.nn.functional.normalize(torch.stack(means), dim=1)
