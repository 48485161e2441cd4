"""The published layouts of seven classification sets and of Karpathy's splits, in miniature."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cibr.data import DataOptions, Dataset, open_dataset
from cibr.errors import UsageError

PLAIN = ["a photo of a {}."]


def draw(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(file, "JPEG")


def opened(spec: str, split: str = "test", limit: int | None = None) -> Dataset:
    return open_dataset(DataOptions(data=spec, limit=limit), split)


def labelled(dataset: Dataset) -> dict[str, str]:
    """Key -> class name; the images can be read."""
    assert dataset.labels is not None and dataset.class_names is not None
    assert all(dataset.image(row).mode == "RGB" for row in range(len(dataset)))
    return {dataset.keys[row]: dataset.class_names[label] for row, label in enumerate(dataset.labels.tolist())}


def test_pets(tmp_path: Path) -> None:
    root = tmp_path / "oxford-iiit-pet"
    draw(*(root / "images" / f"{name}.jpg" for name in ("Abyssinian_1", "great_pyrenees_7", "Abyssinian_2")))
    (root / "annotations").mkdir()
    (root / "annotations/test.txt").write_text("Abyssinian_1 1 1 1\ngreat_pyrenees_7 2 2 1\n")
    (root / "annotations/trainval.txt").write_text("Abyssinian_2 1 1 1\n")
    expected = {"images/Abyssinian_1.jpg": "Abyssinian", "images/great_pyrenees_7.jpg": "great pyrenees"}
    for place in (tmp_path, root):
        assert labelled(opened(f"pets:{place}")) == expected
    assert opened(f"pets:{root}").templates == ["a photo of a {}, a type of pet."]
    assert list(labelled(opened(f"pets:{root}", "train"))) == ["images/Abyssinian_2.jpg"]


def test_dtd(tmp_path: Path) -> None:
    draw(
        *(tmp_path / "images" / name for name in ("dotted/dotted_1.jpg", "banded/banded_1.jpg", "dotted/dotted_2.jpg"))
    )
    (tmp_path / "labels").mkdir()
    for split, lines in (
        ("test", "dotted/dotted_1.jpg\nbanded/banded_1.jpg\n"),
        ("train", "dotted/dotted_2.jpg"),
        ("val", ""),
    ):
        (tmp_path / f"labels/{split}1.txt").write_text(lines)
    dataset = opened(f"dtd:{tmp_path}")
    assert labelled(dataset) == {"images/dotted/dotted_1.jpg": "dotted", "images/banded/banded_1.jpg": "banded"}
    assert dataset.templates == ["{} texture."]
    assert list(labelled(opened(f"dtd:{tmp_path}", "train"))) == ["images/dotted/dotted_2.jpg"]


def test_sun397_with_and_without_partitions(tmp_path: Path) -> None:
    root = tmp_path / "SUN397"
    draw(root / "a/abbey/sun_a.jpg", root / "a/apse/indoor/sun_b.jpg")
    (root / "ClassName.txt").write_text("/a/abbey\n/a/apse/indoor\n")
    expected = {"a/abbey/sun_a.jpg": "abbey", "a/apse/indoor/sun_b.jpg": "indoor apse"}
    assert labelled(opened(f"sun397:{tmp_path}")) == expected
    (root / "Testing_01.txt").write_text("/a/apse/indoor/sun_b.jpg\n")
    assert labelled(opened(f"sun397:{tmp_path}")) == {"a/apse/indoor/sun_b.jpg": "indoor apse"}


def test_caltech101_and_eurosat(tmp_path: Path) -> None:
    caltech = tmp_path / "caltech101" / "101_ObjectCategories"
    draw(*(caltech / f"{name}/image_0001.jpg" for name in ("BACKGROUND_Google", "Faces", "Faces_easy", "water_lilly")))
    found = labelled(opened(f"caltech101:{tmp_path}"))
    assert found == {"Faces/image_0001.jpg": "face", "water_lilly/image_0001.jpg": "water lilly"}
    draw(*(tmp_path / f"2750/{name}/{name}_{k}.jpg" for name in ("AnnualCrop", "SeaLake") for k in range(4)))
    dataset = opened(f"eurosat:{tmp_path}", limit=4)
    assert list(labelled(dataset).values()) == ["annual crop land"] * 2 + ["sea or lake"] * 2
    assert dataset.templates == ["a centered satellite photo of {}."]


def test_imagenet_is_told_apart_from_all_thousand(tmp_path: Path) -> None:
    draw(tmp_path / "val/n15075141/x.JPEG", tmp_path / "val/n01440764/x.JPEG")
    dataset = opened(f"imagenet:{tmp_path}")
    assert labelled(dataset) == {"n01440764/x.JPEG": "tench", "n15075141/x.JPEG": "toilet paper"}
    assert len(dataset.class_names or ()) == 1000 and len(dataset.templates or ()) == 80
    draw(tmp_path / "flat/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UsageError, match="no folder such as n01440764; validation images that lie side by side"):
        opened(f"imagenet:{tmp_path / 'flat'}")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was executed')",)


def test_cifar100_is_read_as_published_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    images = np.arange(4 * 3072, dtype=np.uint64).astype(np.uint8).reshape(4, 3072)
    files = {
        "test": {"data": images, "fine_labels": [1, 0, 1, 0]},
        "train": Bomb(),
        "meta": {"fine_label_names": ["apple", "aquarium_fish"]},
    }
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
    for spec in (f"cifar100:{tmp_path}", f"cifar100:{folder}"):
        for split in ("test", "train"):
            with pytest.raises(UsageError, match="does not hold CIFAR-100's train, test and meta as published"):
                opened(spec, split)
    known = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in files}
    monkeypatch.setattr(CIFAR100, "test_list", [["test", known["test"]]])
    monkeypatch.setattr(CIFAR100, "train_list", [["train", known["train"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": known["meta"]})
    dataset = opened(f"cifar100:{tmp_path}")
    assert list(labelled(dataset).values()) == ["aquarium fish", "apple"] * 2
    assert np.array_equal(np.asarray(dataset.image(2)), images[2].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize("kind", ["pets", "caltech101", "dtd", "sun397", "eurosat"])
def test_an_absent_layout_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not look like .*: neither it nor .* in it holds"):
        opened(f"{kind}:{tmp_path}")
    with pytest.raises(UsageError, match="there is no folder"):
        opened(f"{kind}:{tmp_path / 'nowhere'}")


def karpathy(folder: Path, **fields: object) -> Path:
    sentences = [{"raw": "A dog.", "tokens": ["a", "dog"]}, {"raw": " A dog runs . "}]
    images = [
        {"filename": "a.jpg", "split": "test", "sentences": sentences, **fields},
        {"filename": "b.jpg", "split": "restval", "sentences": sentences[:1], **fields},
        {"filename": "../c.jpg", "split": "test", "sentences": sentences, **fields},
        {"filename": "d.jpg", "split": "test", "sentences": [{"raw": " "}], **fields},
    ]
    (folder / "dataset.json").write_text(json.dumps({"images": images, "dataset": "mine"}))
    return folder / "dataset.json"


def test_karpathys_splits(tmp_path: Path) -> None:
    path = karpathy(tmp_path)
    draw(tmp_path / "flickr30k-images/a.jpg", tmp_path / "flickr30k-images/b.jpg")
    dataset = opened(f"karpathy:{path}")
    assert dataset.keys[0] == "a.jpg" and dataset.captions(0) == ("A dog.", "A dog runs .") and len(dataset) == 1
    assert dataset.image(0).size == (8, 8)
    assert dataset.skipped.counts == {"image outside the set's folder": 1, "no caption": 1}
    assert list(opened(f"karpathy:{path}", "train").keys) == ["b.jpg"]
    draw(tmp_path / "val2014/a.jpg")
    assert opened(f"karpathy:{karpathy(tmp_path, filepath='val2014')}").image(0).size == (8, 8)
    with pytest.raises(UsageError, match="no image of the split 'val'; it has restval, test"):
        opened(f"karpathy:{path}", "val")


def test_what_is_no_karpathy_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the first image of .*dataset.json, a.jpg, is in none of"):
        opened(f"karpathy:{karpathy(tmp_path)}")
    (tmp_path / "other.json").write_text('{"images": [{"file_name": "a.jpg"}]}')
    with pytest.raises(UsageError, match=r"not in the format of Karpathy's splits \(KeyError: 'filename'\)"):
        opened(f"karpathy:{tmp_path / 'other.json'}")
    with pytest.raises(UsageError, match="there is no file"):
        opened(f"karpathy:{tmp_path / 'nowhere.json'}")
