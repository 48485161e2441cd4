"""Zero-shot classification equals open_clip's on the same features, and refuses what has no meaning."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cibr.errors import UsageError
from cibr.evaluate.zero_shot import build_classifier, fill, zero_shot

NAMES = [f"{colour} {thing}" for colour in ("red", "green", "blue") for thing in ("dog", "cup", "car", "tree")] + ["x"]
TEMPLATES = ["a photo of a {}.", "{} in a drawing", "a {}, of wood"]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    import open_clip

    torch.manual_seed(0)
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
    text = {"layers": 2, "width": 32, "heads": 2, "context_length": 16}
    return open_clip.CLIP(16, vision, text).eval()


def test_the_classifier_is_open_clips_to_the_last_bit(model: torch.nn.Module) -> None:
    import open_clip

    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, TEMPLATES)
    encode = lambda tokens: model.encode_text(tokens, normalize=True)  # noqa: E731
    ours = build_classifier(encode, tokenizer, NAMES, TEMPLATES)
    assert torch.equal(ours.T, theirs)
    assert torch.equal(ours, build_classifier(encode, tokenizer, NAMES, [t.replace("{}", "{c}") for t in TEMPLATES]))


def test_accuracies_are_those_of_topk() -> None:
    features, classifier = F.normalize(torch.randn(300, 16), dim=1), F.normalize(torch.randn(13, 16), dim=1)
    labels = torch.randint(0, 12, (300,))  # class 12 has no image
    nearest = (100 * features @ classifier.T).topk(5, dim=1).indices
    right = nearest == labels[:, None]
    score = zero_shot(features, classifier, labels)
    assert score["top1"] == pytest.approx(100 * right[:, 0].double().mean().item(), abs=1e-12)
    assert score["top5"] == pytest.approx(100 * right.any(1).double().mean().item(), abs=1e-12)
    per_class = [right[labels == c, 0].double().mean().item() for c in range(12)]
    assert score["mean_per_class"] == pytest.approx(100 * sum(per_class) / 12, abs=1e-12)


def test_a_template_is_no_program() -> None:
    assert fill("{0.__class__} of {c}", "dog") == "{0.__class__} of dog"


def test_prompts_without_a_name_are_refused(model: torch.nn.Module) -> None:
    def build(names: list[str], templates: list[str]) -> None:
        build_classifier(model.encode_text, lambda texts: torch.zeros(len(texts), 16), names, templates)

    with pytest.raises(UsageError, match="'a photo' has no place for the class name"):
        build(["dog"], ["a photo"])
    with pytest.raises(UsageError, match="class 1 has an empty name"):
        build(["dog", " "], ["{}"])
    with pytest.raises(UsageError, match="needs names and templates, got 0 and 1"):
        build([], ["{}"])


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_weights_that_are_nan_are_no_perfect_score(broken: float) -> None:
    features = F.normalize(torch.randn(4, 8), dim=1)
    features[2] = broken
    with pytest.raises(UsageError, match="image features are NaN or infinite in 1 of 4 rows"):
        zero_shot(features, torch.eye(8), torch.arange(4))
    with pytest.raises(UsageError, match="class embeddings are NaN or infinite in 1 of 4"):
        zero_shot(torch.eye(8), features, torch.arange(4).repeat(2))


def test_collapsed_features_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="9 of 9 queries score a candidate of another group exactly like"):
        zero_shot(torch.ones(9, 4), torch.ones(3, 4), torch.arange(3).repeat(3))


def test_labels_without_a_class_are_refused() -> None:
    with pytest.raises(UsageError, match="labels go from 0 to 3, but there are 3 class names"):
        zero_shot(torch.eye(4), torch.eye(4)[:3], torch.arange(4))
