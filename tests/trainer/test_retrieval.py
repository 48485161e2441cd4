"""Retrieval equals clip_benchmark's on the same features; ties, distractors and unasked queries by definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cibr.errors import UsageError
from cibr.evaluate.retrieval import DEPTHS, ranks, recalls, retrieval


def captioned(images: int, captions: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit-norm images and noisy captions, `captions[i]` of image i, with the image of each caption."""
    image_of_text = torch.repeat_interleave(torch.arange(images), torch.tensor(captions))
    image = F.normalize(torch.randn(images, 16), dim=1)
    return image, F.normalize(image[image_of_text] + 0.6 * torch.randn(len(image_of_text), 16), dim=1), image_of_text


def test_retrieval_is_clip_benchmarks() -> None:
    from clip_benchmark.metrics import zeroshot_retrieval as theirs

    image, text, image_of_text = captioned(90, [1 + i % 5 for i in range(90)])
    scores = text @ image.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), image_of_text] = True
    ours = retrieval(image, text, image_of_text)
    for k in DEPTHS:
        found = (theirs.recall_at_k(scores, positive, k) > 0).float().mean().item()
        assert ours[f"text_to_image@{k}"] == pytest.approx(100 * found, rel=1e-6)
        found = (theirs.recall_at_k(scores.T, positive.T, k) > 0).float().mean().item()
        assert ours[f"image_to_text@{k}"] == pytest.approx(100 * found, rel=1e-6)
    assert 20 < ours["text_to_image@1"] < 95 and 20 < ours["image_to_text@1"] < 95  # the comparison can fail


def test_ranks_do_not_depend_on_blocks() -> None:
    image, text, image_of_text = captioned(40, [3] * 40)
    whole = ranks(text, image_of_text, image, torch.arange(40))
    assert torch.equal(ranks(text, image_of_text, image, torch.arange(40), block=7), whole)
    brute = [(score > score[i]).sum().item() for score, i in zip(text @ image.T, image_of_text, strict=True)]
    assert whole.tolist() == brute


@pytest.mark.filterwarnings("ignore:.* queries score a candidate of another group")
def test_ties_count_as_found_and_lone_queries_are_not_asked() -> None:
    image = torch.eye(4)
    text = torch.stack([image[0], image[0], image[2], image[3]])  # images 0 and 1 have the same caption
    rank = ranks(text, torch.tensor([0, 1, 2, 9]), image, torch.tensor([0, 1, 2, 3]))
    assert rank.tolist() == [0, 1, 0, -1]
    score = retrieval(image, text[:3], torch.tensor([0, 1, 2]))
    assert score["text_to_image@1"] == pytest.approx(200 / 3)
    assert score["image_to_text@1"] == 100  # image 1 is as far from each, image 3 has no caption


def test_groups_share_their_captions() -> None:
    group = torch.tensor([5, 5, 7])
    image = F.normalize(torch.eye(3) + torch.tensor([[0, 0, 0], [0.1, 0, 0.5], [0.1, 0, 0]]), dim=1)
    score = recalls(image, group, torch.eye(3)[[0, 2]], torch.tensor([5, 7]))
    assert score["image_to_text@1"] == pytest.approx(200 / 3) and score["text_to_image@1"] == 100


def test_what_cannot_be_retrieved_is_refused() -> None:
    image, text, image_of_text = captioned(5, [1] * 5)
    with pytest.raises(UsageError, match="5 captions, but image_of_text names 4"):
        retrieval(image, text, image_of_text[:4])
    with pytest.raises(UsageError, match="names image 5, but there are 5 images"):
        retrieval(image, text, image_of_text + 1)
    with pytest.raises(UsageError, match="16 columns and text features 8"):
        retrieval(image, text[:, :8], image_of_text)
    with pytest.raises(UsageError, match="text features are NaN or infinite in 5 of 5"):
        retrieval(image, text * float("nan"), image_of_text)
    with pytest.raises(UsageError, match="no image has a caption"):
        recalls(image, torch.arange(5), text, torch.arange(5) + 5)
