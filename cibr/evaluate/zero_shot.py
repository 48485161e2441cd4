"""Zero-shot classification by prompts.

    w_c = normalize(mean_t normalize(f(template_t(name_c))))    logits = x W^T

as open_clip and clip_benchmark do, both of whose marks for the place of the name work: {} and {c}.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cibr.errors import UsageError
from cibr.evaluate.retrieval import check_features, ranks, recall

CLASSES_AT_ONCE = 10  # open_clip's; other batches round differently in the last digit


def fill(template: str, name: str) -> str:
    """The template with `name` in place of its mark. Not `str.format`: a template is data."""
    return template.replace("{c}", name).replace("{}", name)


def check_prompts(class_names: Sequence[str], templates: Sequence[str]) -> None:
    """Raises UsageError for no or empty names, and for templates without a place for the name."""
    if not class_names or not templates:
        raise UsageError(f"zero-shot needs names and templates, got {len(class_names)} and {len(templates)}")
    if empty := [c for c, name in enumerate(class_names) if not name.strip()]:
        raise UsageError(f"class {empty[0]} has an empty name; every class needs one")
    for template in templates:
        if "{}" not in template and "{c}" not in template:
            raise UsageError(f"the template {template!r} has no place for the class name: {{}} or {{c}}")


@torch.no_grad()
def build_classifier(
    encode_text: Callable[[Tensor], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """(classes, d): a unit-norm embedding of each class, the mean over its prompts.

    `encode_text` maps tokens to unit-norm embeddings (n, d). Raises UsageError for prompts without a name.
    """
    check_prompts(class_names, templates)
    rows = []
    for start in range(0, len(class_names), CLASSES_AT_ONCE):
        names = class_names[start : start + CLASSES_AT_ONCE]
        prompts = [fill(template, name) for name in names for template in templates]
        mean = encode_text(tokenizer(prompts)).unflatten(0, (len(names), len(templates))).mean(1)
        rows.append(mean / mean.norm(dim=1, keepdim=True))
    return torch.cat(rows)


def zero_shot(image_features: Tensor, classifier: Tensor, labels: Tensor) -> dict[str, float]:
    """`top1`, `top5` and `mean_per_class` (the mean over classes of top-1) in per cent.

    image_features (n, d) and classifier (classes, d) of unit norm, labels (n,) int64. Classes without an image do not
    enter the mean. Raises UsageError for features that are not finite and for labels without a class.
    """
    check_features("the image features", image_features)
    check_features("the class embeddings", classifier)
    classes = len(classifier)
    if len(labels) != len(image_features):
        raise UsageError(f"{len(image_features)} images, but {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= classes:
        raise UsageError(
            f"labels go from {int(labels.min())} to {int(labels.max())}, but there are {classes} class names"
        )
    rank = ranks(image_features, labels, classifier, torch.arange(classes, device=labels.device))
    right = torch.bincount(labels, (rank == 0).double(), minlength=classes)
    count = torch.bincount(labels, minlength=classes)
    per_class = right[count > 0] / count[count > 0]
    return {"top1": recall(rank, 1), "top5": recall(rank, 5), "mean_per_class": 100 * per_class.mean().item()}
