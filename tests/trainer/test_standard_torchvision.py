"""Miniatures of the standard sets that torchvision's own classes read: the same images, classes and splits as ours.

CIFAR-100 is read by torchvision itself (`test_standard.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from cibr.data import DataOptions, open_dataset

PARTS = [f"{k:02}" for k in range(1, 11)]


@pytest.fixture
def draw() -> Any:
    """Writes images of one colour each, none twice, by which they are known."""
    numbers: Iterator[int] = count(1)

    def write(*files: Path) -> None:
        for file, number in zip(files, numbers, strict=False):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (number * 20 % 256, number * 50 % 256, 0)).save(file, "JPEG", quality=100)

    return write


def ours(spec: str, split: str) -> dict[bytes, str]:
    """Pixels -> class name."""
    dataset = open_dataset(DataOptions(data=spec), split)
    assert dataset.labels is not None and dataset.class_names is not None
    pixels = [np.asarray(dataset.image(k)).tobytes() for k in range(len(dataset))]
    assert len(set(pixels)) == len(pixels) > 0
    return dict(zip(pixels, [dataset.class_names[k] for k in dataset.labels.tolist()], strict=True))


def theirs(dataset: Any, names: list[str]) -> dict[bytes, str]:
    return {
        np.asarray(image.convert("RGB")).tobytes(): names[label]
        for image, label in map(dataset.__getitem__, range(len(dataset)))
    }


def test_imagenet(tmp_path: Path, draw: Any) -> None:
    synsets = {"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish",), "n15075141": ("toilet tissue",)}
    torch.save((synsets, []), tmp_path / "meta.bin")
    draw(
        *(
            tmp_path / split / name / f"{name}_{k}.JPEG"
            for split in ("train", "val")
            for name in synsets
            for k in (1, 2)
        )
    )
    for split, theirs_split in (("train", "train"), ("test", "val")):
        source = datasets.ImageNet(str(tmp_path), split=theirs_split)
        assert source.wnids == list(synsets)
        expected = theirs(source, ["tench", "goldfish", "toilet paper"])  # open_clip's names of these synsets
        assert ours(f"imagenet:{tmp_path}", split) == expected


def test_pets(tmp_path: Path, draw: Any) -> None:
    """The numbers are of breeds, not in the order of cats and dogs, and lists have more columns."""
    root = tmp_path / "oxford-iiit-pet"
    lists = {
        "trainval": ["Abyssinian_1 1 1 1", "american_bulldog_2 2 2 1"],
        "test": ["basset_hound_3 3 2 2", "Abyssinian_9 1 1 1", "american_bulldog_7 2 2 1"],
    }
    for name, lines in lists.items():
        draw(*(root / "images" / f"{line.split()[0]}.jpg" for line in lines))
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    for split, theirs_split in (("train", "trainval"), ("test", "test")):
        source = datasets.OxfordIIITPet(str(tmp_path), split=theirs_split)
        found = ours(f"pets:{tmp_path}", split)
        assert {k: v.lower() for k, v in found.items()} == theirs(source, [name.lower() for name in source.classes])


def test_caltech101(tmp_path: Path, draw: Any) -> None:
    """Less Faces_easy, the same photographs as Faces, cropped."""
    root = tmp_path / "caltech101"
    categories = ["Faces", "Faces_easy", "BACKGROUND_Google", "airplanes", "wild_cat"]
    draw(*(root / "101_ObjectCategories" / name / f"image_{k:04d}.jpg" for name in categories for k in (1, 2)))
    (root / "Annotations").mkdir()
    source = datasets.Caltech101(str(tmp_path))
    names = {"Faces": "face", "airplanes": "airplane", "wild_cat": "wild cat"}
    expected = theirs(source, [names.get(name, "") for name in source.categories])
    assert ours(f"caltech101:{tmp_path}", "test") == {k: name for k, name in expected.items() if name}


def test_dtd(tmp_path: Path, draw: Any) -> None:
    root = tmp_path / "dtd" / "dtd"
    (root / "labels").mkdir(parents=True)
    for split in ("train", "val", "test"):
        lines = [f"{name}/{name}_{split}.jpg" for name in ("zigzagged", "banded", "cracked")]
        draw(*(root / "images" / line for line in lines))
        (root / "labels" / f"{split}1.txt").write_text("\n".join(lines) + "\n")
    sources = {split: datasets.DTD(str(tmp_path), split=split, partition=1) for split in ("train", "val", "test")}
    found = {split: theirs(source, source.classes) for split, source in sources.items()}
    assert ours(f"dtd:{tmp_path}", "test") == found["test"]
    assert ours(f"dtd:{tmp_path}", "train") == found["train"] | found["val"]


def test_sun397(tmp_path: Path, draw: Any) -> None:
    root = tmp_path / "SUN397"
    classes = ["/a/abbey", "/a/apse/indoor", "/y/youth_hostel"]
    draw(*(root / name[1:] / f"sun_{k}{name[-3:]}.jpg" for name in classes for k in range(2)))
    (root / "ClassName.txt").write_text("\n".join(classes) + "\n")
    source = datasets.SUN397(str(tmp_path))
    assert source.classes == [name[3:] for name in classes]
    expected = theirs(source, ["abbey", "indoor apse", "youth hostel"])
    assert ours(f"sun397:{tmp_path}", "test") == expected
    (root / "Partitions").mkdir()
    for part in PARTS:
        for name, number in (("Training", 0), ("Testing", 1)):
            lines = [f"{line}/sun_{number}{line[-3:]}.jpg" for line in classes]
            (root / "Partitions" / f"{name}_{part}.txt").write_text("\n".join(lines) + "\n")
    train, test = ours(f"sun397:{tmp_path}", "train"), ours(f"sun397:{tmp_path}", "test")
    assert not train.keys() & test.keys() and train | test == expected


def test_eurosat(tmp_path: Path, draw: Any) -> None:
    draw(
        *(
            tmp_path / "eurosat" / "2750" / name / f"{name}_{k}.jpg"
            for name in ("SeaLake", "AnnualCrop", "River")
            for k in range(2)
        )
    )
    source = datasets.EuroSAT(str(tmp_path))
    assert source.classes == ["AnnualCrop", "River", "SeaLake"]
    assert ours(f"eurosat:{tmp_path}", "test") == theirs(source, ["annual crop land", "river", "sea or lake"])
