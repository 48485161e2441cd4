"""The emoji set as data: splits by vendor and concept, captions, and the cache of decoded drawings."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toyset
from PIL import Image
from torchvision.transforms import v2

from cibr.data import Batches, DataOptions, open_dataset
from cibr.data import emoji as emoji_data
from cibr.data.emoji import Emoji
from cibr.errors import UsageError

to_tensor = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toyset.build(tmp_path_factory.mktemp("toy"), size=16)


def opened(directory: Path, split: str = "train", **options: Any) -> Emoji:
    found = open_dataset(DataOptions(data=f"emoji:{directory}", **options), split)
    assert isinstance(found, Emoji)
    return found


def concepts(dataset: Emoji) -> list[str]:
    assert dataset.labels is not None
    return [dataset.concepts[label] for label in dataset.labels.tolist()]


def test_rows(directory: Path) -> None:
    dataset = opened(directory, "all")
    assert len(dataset) == 96 and dataset.concepts == sorted(toyset.CONCEPTS)
    row = next(k for k, key in enumerate(dataset.keys) if key == "red-square_plain")
    sample = dataset.sample(row)
    assert isinstance(sample.image, Image.Image) and sample.image.getpixel((8, 8)) == (255, 0, 0)
    assert (
        sample.captions[0] == "red square"
        and sample.captions == dataset.captions(row)
        and sample.style == "plain"
        and sample.image.size == (16, 16)
    )
    assert dataset.class_names is not None and dataset.class_names[sample.label or 0] == "red square"
    assert dataset.augment == "drawing" and dataset.distinct_groups and not dataset.skipped.total


def test_a_plain_folder_of_the_set_is_emoji(directory: Path) -> None:
    assert isinstance(open_dataset(DataOptions(data=str(directory))), Emoji)


@pytest.mark.parametrize(
    ("hold_out", "training", "tested"),
    [
        ("round-house", {"small", "framed"}, {"plain", "thick"}),  # a family
        ("thick", {"small", "framed"}, {"thick"}),  # a style: the rest of its family is not trained on either
        (None, set(toyset.STYLES), None),
    ],
)
def test_splits(directory: Path, hold_out: str | None, training: set[str], tested: set[str] | None) -> None:
    options = {"hold_out": hold_out, "unseen_fraction": 0.25}
    train, unseen = opened(directory, **options), opened(directory, "unseen", **options)
    assert len(train.concepts) == 18 and len(unseen.concepts) == 6
    assert not set(train.concepts) & set(unseen.concepts)
    assert set(concepts(train)) == set(train.concepts) and set(concepts(unseen)) == set(unseen.concepts)
    assert set(train.styles or ()) == set(unseen.styles or ()) == training
    assert len(train) == 18 * len(training)
    if tested is None:
        with pytest.raises(UsageError, match="the split 'held_out' of the emoji needs a vendor: --hold-out"):
            opened(directory, "test", **options)
        return
    held, both = opened(directory, "test", **options), opened(directory, "unseen_held_out", **options)
    assert set(held.styles or ()) == set(both.styles or ()) == tested
    assert held.concepts == train.concepts and both.concepts == unseen.concepts
    assert opened(directory, "held_out", **options).fingerprint() == held.fingerprint() != train.fingerprint()


def test_names_of_splits_and_vendors(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'nobody' is neither .* known are .*round-house.*thick"):
        opened(directory, hold_out="nobody")
    with pytest.raises(UsageError, match="no split 'val'; known are train, held_out, unseen"):
        opened(directory, "val")
    (tmp_path / "small.tar").write_bytes((directory / "small.tar").read_bytes())
    with pytest.raises(UsageError, match="leaves no style to train on"):
        opened(tmp_path, hold_out="small")


def test_limit_and_dropped_groups(directory: Path, tmp_path: Path) -> None:
    assert len(opened(directory, "all", limit=5).concepts) == 5
    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        for concept, group in (("red-circle", "flags"), ("red-cross", "shapes")):
            toyset.add(tar, f"{concept}_plain.png", toyset.draw(concept, "plain", 16))
            toyset.add(tar, f"{concept}_plain.json", json.dumps(toyset.about(concept, "plain", group)).encode())
    assert opened(tmp_path, "all").concepts == ["red-cross"]


def test_captions_are_labels_and_keywords(directory: Path) -> None:
    dataset = opened(directory, "all")
    row = next(k for k, key in enumerate(dataset.keys) if key == "red-square_plain")
    drawn = [dataset.draw(row, number) for number in range(400)]
    assert 0.4 < np.mean([text == "red square" for text in drawn]) < 0.6
    assert 0.2 < np.mean([text.startswith("red square ") for text in drawn]) < 0.4
    assert {word for text in drawn for word in text.split()} == {"red", "square", "shape"}
    assert len(set(drawn)) > 8 and drawn == [dataset.draw(row, number) for number in range(400)]
    assert {"red square", "shape"} <= set(dataset.words())


def test_batches_are_of_distinct_concepts_and_any_style(directory: Path) -> None:
    options = DataOptions(data=f"emoji:{directory}", hold_out="little-house", workers=0, unseen_fraction=0.0)
    dataset = open_dataset(options)
    stream = Batches(dataset, options, batch_size=24, seed=0, transform=to_tensor).start(0)
    taken = list(islice(stream, 40))
    assert all(len(batch["group_ids"].unique()) == 24 for batch in taken)
    assert set(torch.cat([batch["index"] for batch in taken]).tolist()) == set(range(len(dataset)))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of the images that were decoded since."""
    calls: list[int] = []
    decode = emoji_data.decode
    monkeypatch.setattr(emoji_data, "decode", lambda data, most: calls.append(len(data)) or decode(data, most))
    return calls  # type: ignore[return-value]


def test_drawings_are_decoded_once(tmp_path: Path, cache_home: Path, decoded: list[int]) -> None:
    directory = toyset.build(tmp_path / "set", size=16)
    first = opened(directory)
    assert len(decoded) == 96 and isinstance(first.images, np.memmap)
    again = opened(directory)
    assert len(decoded) == 96 and again.fingerprint() == first.fingerprint()
    assert np.array_equal(again.images, first.images)
    toyset.build(directory, size=20)  # changed: decoded anew, and the old cache is gone
    assert opened(directory).images.shape[1] == 20 and len(decoded) == 192
    assert len(list((cache_home / "cibr").iterdir())) == 1
    (next((cache_home / "cibr").iterdir()) / "images.npy").write_bytes(b"damaged")
    assert len(opened(directory)) and len(decoded) == 288


def test_without_a_place_for_the_cache(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[int]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    expected = opened(directory).image(3)
    assert len(decoded) == 96 and expected.size == (16, 16)
    opened(directory)
    assert len(decoded) == 192


def test_what_cannot_be_read_is_counted_again_from_the_cache(tmp_path: Path, decoded: list[int]) -> None:
    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        good, bad_image, no_text, bad_text = "red-circle", "red-cross", "red-square", "blue-cross"
        for concept in (bad_image, good, no_text, bad_text):
            image = b"not a picture" if concept == bad_image else toyset.draw(concept, "plain", 16)
            toyset.add(tar, f"{concept}_plain.png", image)
            if concept != no_text:
                text = b"{" if concept == bad_text else json.dumps(toyset.about(concept, "plain")).encode()
                toyset.add(tar, f"{concept}_plain.json", text)
    for _ in range(2):
        dataset = opened(tmp_path, "all")
        assert dataset.concepts == [good] and dataset.image(0).getpixel((8, 8)) == (255, 0, 0)
        counts = {"no .json": 1, "damaged .json": 1, "unreadable image (UnidentifiedImageError)": 1}
        assert dataset.skipped.counts == counts
    assert len(decoded) == 2
