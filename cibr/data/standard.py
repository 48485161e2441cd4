"""The paper's seven classification sets in the layouts that their authors publish, with class names and prompts.

    imagenet:DIR     train|val/nXXXXXXXX/*.JPEG                    names and 80 templates of open_clip
    cifar100:DIR     cifar-100-python/{train,test,meta}            by torchvision, which checks their MD5 before reading
    pets:DIR         annotations/{trainval,test}.txt, images/
    caltech101:DIR   101_ObjectCategories/CLASS/                   less BACKGROUND_Google and Faces_easy; no split
    dtd:DIR          labels/{train,val,test}1.txt, images/CLASS/
    sun397:DIR       ClassName.txt, a/abbey/ ..., {Training,Testing}_01.txt there or in Partitions/, else no split
    eurosat:DIR      2750/CLASS/                                   no split

DIR is the set's folder, or torchvision's root above it. Anything but the split "train" is what is published to test on;
a set without a split is the same whatever is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cibr.data.csv import FileImages
from cibr.data.dataset import Dataset
from cibr.data.images import ENDINGS
from cibr.data.listing import TEMPLATE, Listing
from cibr.data.options import DataOptions
from cibr.errors import UsageError

Found = tuple[Path, list[tuple[str, int]], list[str]]  # folder, (path below it, class) of each image, class names
TEMPLATES = {
    "pets": ["a photo of a {}, a type of pet."],
    "dtd": ["{} texture."],
    "eurosat": ["a centered satellite photo of {}."],
}
RENAMED = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "herbaceous vegetation land",
    "Highway": "highway or road",
    "Industrial": "industrial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings",
    "River": "river",
    "SeaLake": "sea or lake",
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
}


def open_standard(kind: str, place: str, options: DataOptions, split: str) -> Dataset:
    """The set `kind` in the folder `place`. Raises UsageError where its layout is not there."""
    if not Path(place).is_dir():
        raise UsageError(f"there is no folder {place}")
    if kind == "cifar100":
        return open_cifar100(Path(place), options, split)
    folder, rows, names = LAYOUTS[kind](Path(place), split)
    listing = Listing()
    for path, label in spread(rows, options.limit):
        listing.add(path, (), label, path)
    columns = listing.columns([spoken(name) for name in names], templates(kind))
    return FileImages(folder, listing.places, options.max_pixels, **columns)


def templates(kind: str) -> list[str]:
    """The prompts of a set, the one for photographs where it has none of its own."""
    if kind == "imagenet":
        import open_clip

        return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    return TEMPLATES.get(kind, [TEMPLATE])


def spoken(name: str) -> str:
    """A class's name as one would say it, from that of its folder."""
    return RENAMED.get(name, name.replace("_", " ").strip())


def spread(rows: Sequence[tuple[str, int]], limit: int | None) -> Sequence[tuple[str, int]]:
    """`limit` of the rows, spread evenly over all, which are sorted by class."""
    n = len(rows)
    return rows if limit is None or limit >= n else [rows[k * n // limit] for k in range(limit)]


class Arrays(Dataset):
    """Rows whose images are in memory, (n, height, width, 3) uint8."""

    def __init__(self, images: np.ndarray, **columns: object) -> None:
        super().__init__(**columns)  # type: ignore[arg-type]
        self.images = images

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])


def open_cifar100(root: Path, options: DataOptions, split: str) -> Dataset:
    """By torchvision: the files are pickles, which it reads only when they are the published ones to the byte."""
    from torchvision.datasets import CIFAR100

    root = root.parent if root.name == CIFAR100.base_folder else root
    try:
        source = CIFAR100(str(root), train=split == "train")
    except RuntimeError as error:
        raise UsageError(
            f"{root / CIFAR100.base_folder} does not hold CIFAR-100's train, test and meta as published (by MD5)"
        ) from error
    listing = Listing()
    for key, label in spread([(str(k), label) for k, label in enumerate(source.targets)], options.limit):
        listing.add(key, (), label, int(key))
    columns = listing.columns([spoken(name) for name in source.classes], templates("cifar100"))
    return Arrays(source.data[listing.places], **columns)


def found_in(root: Path, what: str, marker: str, *inner: str) -> Path:
    """The first of root and root/inner that has the `marker`. Raises UsageError if none has."""
    for folder in (root, *(root / name for name in inner)):
        if (folder / marker).exists():
            return folder
    raise UsageError(
        f"{root} does not look like {what}: neither it nor {' or '.join(inner)} in it holds {marker}; "
        "a folder of images per class is folder:DIR"
    )


def subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def by_folder(folder: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """The images of folder/CLASS/, sorted. Raises UsageError for a class without a folder."""
    rows = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise UsageError(f"{folder} has no folder for the class {name}")
        files = sorted(file.name for file in (folder / name).iterdir() if file.suffix[1:].lower() in ENDINGS)
        rows += [(f"{name}/{file}", label) for file in files]
    return rows


def imagenet(root: Path, split: str) -> Found:
    """Class numbers are of all 1000, so images of a part of the classes are still told apart from all."""
    import open_clip
    from timm.data import ImageNetInfo

    name = "train" if split == "train" else "val"
    folder = root / name if (root / name).is_dir() else root
    number = {synset: k for k, synset in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    there = [synset for synset in subfolders(folder) if synset in number]
    if not there:
        raise UsageError(
            f"{folder} does not look like ImageNet: it holds no folder such as n01440764; validation images that lie "
            "side by side have to be sorted into those first"
        )
    rows = [(path, number[there[k]]) for path, k in by_folder(folder, there)]
    return folder, rows, list(open_clip.IMAGENET_CLASSNAMES)


def pets(root: Path, split: str) -> Found:
    folder = found_in(root, "Oxford-IIIT Pets", "annotations/test.txt", "oxford-iiit-pet")
    file = folder / "annotations" / ("trainval.txt" if split == "train" else "test.txt")
    parts = [line.split() for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    label = {name.rpartition("_")[0]: int(number) - 1 for name, number, *_ in parts}
    rows = [(f"images/{name}.jpg", label[name.rpartition("_")[0]]) for name, *_ in parts]
    return folder, rows, sorted(label, key=lambda name: label[name])


def caltech101(root: Path, split: str) -> Found:
    folder = found_in(root, "Caltech101", "101_ObjectCategories", "caltech101", "caltech-101") / "101_ObjectCategories"
    names = [name for name in subfolders(folder) if name not in ("BACKGROUND_Google", "Faces_easy")]
    return folder, by_folder(folder, names), names


def dtd(root: Path, split: str) -> Found:
    folder = found_in(root, "DTD", "labels/test1.txt", "dtd", "dtd/dtd")
    files = ("train1.txt", "val1.txt") if split == "train" else ("test1.txt",)
    lines = [line for file in files for line in (folder / "labels" / file).read_text().split()]
    label = {name: k for k, name in enumerate(sorted({line.partition("/")[0] for line in lines}))}
    return folder, [(f"images/{line}", label[line.partition("/")[0]]) for line in lines], list(label)


def sun397(root: Path, split: str) -> Found:
    """`/a/apse/indoor` is called "indoor apse"."""
    folder = found_in(root, "SUN397", "ClassName.txt", "SUN397")
    classes = [name.lstrip("/") for name in (folder / "ClassName.txt").read_text().split()]
    names = [" ".join(reversed(name.split("/")[1:])) for name in classes]
    file = "Training_01.txt" if split == "train" else "Testing_01.txt"
    part = next((path for path in (folder / "Partitions" / file, folder / file) if path.is_file()), None)
    if part is None:
        return folder, by_folder(folder, classes), names
    label = {name: k for k, name in enumerate(classes)}
    lines = [line.lstrip("/") for line in part.read_text().split()]
    return folder, [(line, label[line.rpartition("/")[0]]) for line in lines], names


def eurosat(root: Path, split: str) -> Found:
    folder = found_in(root, "EuroSAT", "AnnualCrop", "2750", "eurosat/2750", "EuroSAT_RGB")
    names = subfolders(folder)
    return folder, by_folder(folder, names), names


STANDARD = ("imagenet", "cifar100", "pets", "caltech101", "dtd", "sun397", "eurosat")
LAYOUTS: dict[str, Callable[[Path, str], Found]] = {
    "imagenet": imagenet,
    "pets": pets,
    "caltech101": caltech101,
    "dtd": dtd,
    "sun397": sun397,
    "eurosat": eurosat,
}
