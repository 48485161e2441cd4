"""A folder of images per class; captions come from templates. As torchvision's ImageFolder."""

from __future__ import annotations

import os
from pathlib import Path

from cibr.data.csv import FileImages
from cibr.data.dataset import Dataset
from cibr.data.images import ENDINGS
from cibr.data.listing import Listing, names_and_templates
from cibr.data.options import DataOptions
from cibr.errors import UsageError


def open_folder(place: str, options: DataOptions, split: str) -> Dataset:
    """DIR/CLASS/**/IMAGE, or DIR/SPLIT/CLASS/... where there is a folder of the split's name.

    Class names are those of the folders, with spaces for underscores, or the lines of classnames.txt in their order.
    """
    root = Path(place)
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}")
    images = root / split if (root / split).is_dir() else root
    classes = sorted(entry.name for entry in os.scandir(images) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UsageError(f"{images} holds no folder; a class is a folder of images")
    names, templates = names_and_templates(images, root)
    if names is not None and len(names) != len(classes):
        raise UsageError(f"classnames.txt has {len(names)} names, but {images} has {len(classes)} class folders")
    listing = Listing()
    found = []
    for number, name in enumerate(classes):
        for file in files_below(images / name):
            if file.suffix[1:].lower() in ENDINGS:
                found.append((number, str(file.relative_to(images))))
            else:
                listing.skipped.add("file that is no image", str(file))
    n = min(len(found), options.limit or len(found))
    for number, path in (found[k * len(found) // n] for k in range(n)):  # of all classes, whatever the limit
        listing.add(path, (), number, path)
    columns = listing.columns(names or [name.replace("_", " ") for name in classes], templates)
    return FileImages(images, listing.places, options.max_pixels, **columns)


def files_below(folder: Path) -> list[Path]:
    """Sorted; links to folders are not followed, which could lead in circles."""
    return sorted(Path(where) / name for where, _, names in os.walk(folder) for name in names)
