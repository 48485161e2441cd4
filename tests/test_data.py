"""Data: reading, splitting, drawing, captions, and building the emoji set from a small fake of its packages."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import toyset

from cibr.data import ConceptSampler, Pairs, augment, load, split
from cibr.errors import UsageError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toyset.build(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def pairs(directory: Path) -> Pairs:
    return load(directory, image_size=16)


def test_load(pairs: Pairs) -> None:
    n = len(toyset.CONCEPTS) * len(toyset.STYLES)
    assert pairs.images.shape == (n, 3, 16, 16) and pairs.images.dtype == torch.uint8
    assert [c.key for c in pairs.concepts] == sorted(toyset.CONCEPTS)
    assert dict(zip(pairs.styles, pairs.families, strict=True)) == toyset.STYLES
    assert pairs.skipped == 0
    red = next(c for c, concept in enumerate(pairs.concepts) if concept.key == "red-square")
    row = pairs.rows([red], [pairs.styles.index("plain")])
    assert pairs.images[row[0], :, 8, 8].tolist() == [255, 0, 0]


def test_limit_and_dropped_groups(directory: Path, tmp_path: Path) -> None:
    assert len(load(directory, limit=5).concepts) == 5
    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        for concept, group in (("red-circle", "flags"), ("red-cross", "shapes")):
            toyset.add(tar, f"{concept}_plain.png", toyset.draw(concept, "plain", 16))
            toyset.add(tar, f"{concept}_plain.json", json.dumps(toyset.about(concept, "plain", group)).encode())
    assert [c.key for c in load(tmp_path).concepts] == ["red-cross"]


def test_corrupt_samples_are_skipped_and_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        good, bad_image, no_text, bad_text = "red-circle", "red-cross", "red-square", "blue-cross"
        for concept in (good, bad_image, no_text, bad_text):
            image = b"not a picture" if concept == bad_image else toyset.draw(concept, "plain", 16)
            toyset.add(tar, f"{concept}_plain.png", image)
            if concept != no_text:
                text = b"{" if concept == bad_text else json.dumps(toyset.about(concept, "plain")).encode()
                toyset.add(tar, f"{concept}_plain.json", text)
    with pytest.warns(UserWarning, match="3 samples of .* skipped"):
        pairs = load(tmp_path)
    assert pairs.skipped == 3 and [c.key for c in pairs.concepts] == [good]


def test_a_tar_cut_short_is_read_as_far_as_it_goes(directory: Path, tmp_path: Path) -> None:
    whole = (directory / "plain.tar").read_bytes()
    (tmp_path / "plain.tar").write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.warns(UserWarning, match="skipped"):
        pairs = load(tmp_path)
    assert 0 < len(pairs.images) < len(toyset.CONCEPTS) and pairs.skipped >= 1


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no folder .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"holds no \.tar"):
        load(tmp_path)


def test_split_holds_out_whole_families_and_the_same_concepts_of_every_vendor(pairs: Pairs) -> None:
    parts = split(pairs, "round-house", 0.25)
    assert {pairs.styles[s] for s in parts.train_styles} == {"small", "framed"}
    assert {pairs.styles[s] for s in parts.test_styles} == {"plain", "thick"}
    assert len(parts.unseen) == 6 and set(parts.seen) | set(parts.unseen) == set(range(24))
    assert not set(parts.seen) & set(parts.unseen)
    rows = pairs.rows(parts.seen, parts.train_styles)
    assert len(rows) == 18 * 2
    assert not np.isin(pairs.concept[rows], parts.unseen).any()
    assert {pairs.families[s] for s in pairs.style[rows]} == {"little-house", "frame-house"}


def test_split_by_style_keeps_the_rest_of_its_family_from_training(pairs: Pairs) -> None:
    parts = split(pairs, "thick")
    assert {pairs.styles[s] for s in parts.test_styles} == {"thick"}
    assert {pairs.styles[s] for s in parts.train_styles} == {"small", "framed"}


def test_split_without_hold_out(pairs: Pairs) -> None:
    parts = split(pairs, None, 0.0)
    assert parts.test_styles == () and len(parts.train_styles) == 4 and len(parts.seen) == 24


def test_split_names_the_known_ones(pairs: Pairs) -> None:
    with pytest.raises(UsageError, match=r"'nobody' is neither .* known are .*round-house.*thick"):
        split(pairs, "nobody")


def test_split_leaves_something_to_train_on(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "small.tar").write_bytes((directory / "small.tar").read_bytes())
    with pytest.raises(UsageError, match="leaves no style to train on"):
        split(load(tmp_path), "small")


def test_batches_are_of_distinct_concepts_and_any_style(pairs: Pairs) -> None:
    parts = split(pairs, "little-house")
    rows = pairs.rows(parts.seen, parts.train_styles)
    sampler = ConceptSampler(pairs.concept, rows, 16)
    drawn = [sampler.draw(np.random.default_rng((0, step))) for step in range(50)]
    for batch in drawn:
        assert len(set(pairs.concept[batch])) == 16
    assert set(np.concatenate(drawn)) == set(rows)
    assert (sampler.draw(np.random.default_rng((0, 7))) == drawn[7]).all()


def test_a_batch_cannot_hold_more_than_all_concepts(pairs: Pairs) -> None:
    with pytest.raises(UsageError, match="--batch-size 25 is more than the 24 concepts"):
        ConceptSampler(pairs.concept, np.arange(len(pairs.images)), 25)


def test_augment_keeps_white_paper_grey_drawings_and_the_range() -> None:
    paper = torch.ones(6, 3, 16, 16)
    assert torch.allclose(augment(paper, np.random.default_rng(0)), paper, atol=1e-6)
    grey = paper.clone()
    grey[:, :, 4:12, 4:12] = 0.3
    result = augment(grey, np.random.default_rng(0))
    assert torch.allclose(result[:, 0], result[:, 1], atol=1e-5)  # recolouring mixes channels
    assert not torch.equal(result, grey)
    noise = augment(torch.rand(6, 3, 16, 16), np.random.default_rng(1))
    assert noise.min() >= -1e-6 and noise.max() <= 1 + 1e-6
