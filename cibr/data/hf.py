"""Hugging Face `datasets`, from the hub or a local folder, opened without running code of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from cibr.data.dataset import Dataset, SkipSample
from cibr.data.images import decode, read_image_file
from cibr.data.listing import Listing, checked_class, clean
from cibr.data.options import DataOptions
from cibr.errors import UsageError

CAPTION_COLUMNS = ("captions", "caption", "text", "sentences", "title")


class HuggingFace(Dataset):
    """Rows of a table whose image column holds bytes or paths."""

    def __init__(self, images: Any, rows: list[int], max_pixels: int, **columns: object) -> None:
        super().__init__(**columns)  # type: ignore[arg-type]
        self.images, self.rows, self.max_pixels = images, rows, max_pixels

    def image(self, index: int) -> Image.Image:
        found = self.images[self.rows[index]]
        if found is None:
            raise SkipSample("no image")
        data = found.get("bytes")
        return decode(data if data is not None else read_image_file(Path(found["path"])), self.max_pixels)


def open_hf(place: str, options: DataOptions, split: str) -> Dataset:
    """Raises UsageError if `datasets` is not installed or cannot open it, and for columns that are not there."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"hf:{place} needs a further package: pip install datasets") from error
    table = _choose_split(_load(datasets, place), options.hf_split, split, place)
    image_column = options.image_column or _first(table, datasets.Image)
    caption_column = options.caption_column or next((c for c in CAPTION_COLUMNS if c in table.column_names), None)
    class_column = _first(table, datasets.ClassLabel)
    for name, column in (("--image-column", image_column), ("--caption-column", caption_column)):
        missing = column is None and (name == "--image-column" or class_column is None)
        if missing or (column is not None and column not in table.column_names):
            raise UsageError(f"hf:{place} has the columns {', '.join(table.column_names)}; say which it is: {name}")
    table = table.cast_column(image_column, datasets.Image(decode=False))
    listing = Listing(options.limit)
    captions = table[caption_column] if caption_column else [None] * len(table)
    classes = table[class_column] if class_column else [None] * len(table)
    for row, (caption, named) in enumerate(zip(captions, classes, strict=True)):
        if listing.full:
            break
        with listing.row(f"row {row}"):
            texts = () if caption_column is None else clean([caption] if isinstance(caption, str) else caption or ())
            listing.add(str(row), texts, checked_class(named) if class_column else None, row)
    names = table.features[class_column].names if class_column else None
    columns = listing.columns(names)
    return HuggingFace(table[image_column], listing.places, options.max_pixels, **columns)


def _load(datasets: Any, place: str) -> Any:
    """What `save_to_disk` wrote, or what `load_dataset` takes: a name on the hub, or a folder of data files."""
    try:
        if any((Path(place) / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            return datasets.load_from_disk(place)
        return datasets.load_dataset(place)
    except Exception as error:  # the library raises much, of the network too
        raise UsageError(f"hf:{place} cannot be opened: {type(error).__name__}: {error}") from error


def _choose_split(found: Any, asked: str | None, split: str, place: str) -> Any:
    if not isinstance(found, dict):
        return found
    wanted = [asked] if asked else ["train"] if split == "train" else [split, "test", "validation"]
    for name in wanted:
        if name in found:
            return found[name]
    raise UsageError(f"hf:{place} has the splits {', '.join(found)}, not {wanted[0]}; choose one: --hf-split")


def _first(table: Any, kind: type) -> str | None:
    """The first column of a kind."""
    return next((name for name, feature in table.features.items() if isinstance(feature, kind)), None)
