"""COCO's, Flickr30K's and Flickr8K's captions in the JSON of Karpathy's splits, five or so an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cibr.data.csv import FileImages
from cibr.data.dataset import Dataset, SkipSample
from cibr.data.listing import Listing, clean
from cibr.data.options import DataOptions
from cibr.errors import UsageError

IMAGE_FOLDERS = ("", "images", "flickr30k-images", "Flicker8k_Dataset")  # beside the JSON


def open_karpathy(place: str, options: DataOptions, split: str) -> Dataset:
    """FILE.json of {"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}]}]}, the images beside it.

    Training takes train and restval, anything else the split of its name (test). Raises UsageError for a file that is
    no such JSON, a split that it has not, and images that are nowhere.
    """
    path = Path(place)
    images = read_images(path)
    wanted = {"train", "restval"} if split == "train" else {split}
    chosen = [image for image in images if image["split"] in wanted][: options.limit]
    if not chosen:
        known = sorted({str(image["split"]) for image in images})
        raise UsageError(f"{path} has no image of the split {split!r}; it has {', '.join(known)}")
    listing = Listing()
    for image in chosen:
        name = name_of(image)
        with listing.row(name):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise SkipSample("image outside the set's folder")
            listing.add(name, clean([sentence["raw"] for sentence in image["sentences"]]), None, name)
    folder = image_folder(path, name_of(chosen[0]))
    return FileImages(folder, listing.places, options.max_pixels, **listing.columns())


def read_images(path: Path) -> list[dict[str, Any]]:
    """The entries of the JSON. Raises UsageError unless each has a file name, a split and sentences."""
    try:
        images = json.loads(path.read_text("utf-8"))["images"]
        for image in images:
            name_of(image), image["split"], [sentence["raw"] for sentence in image["sentences"]]
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {path}") from error
    except (ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path} is not in the format of Karpathy's splits ({what})") from error
    return images


def name_of(image: dict[str, Any]) -> str:
    return str(Path(image.get("filepath", ""), image["filename"]))


def image_folder(path: Path, name: str) -> Path:
    """The folder, beside the JSON, that has the image. Raises UsageError if there is none."""
    for folder in IMAGE_FOLDERS:
        if (path.parent / folder / name).is_file():
            return path.parent / folder
    tried = ", ".join(str(path.parent / folder) for folder in IMAGE_FOLDERS)
    raise UsageError(f"the first image of {path}, {name}, is in none of {tried}")
