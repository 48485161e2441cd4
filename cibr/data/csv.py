"""A table of image paths and captions, as open_clip reads; rows of one image are its captions."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cibr.data.dataset import Dataset, SkipSample
from cibr.data.images import decode, read_image_file
from cibr.data.listing import Listing, clean
from cibr.data.options import DataOptions
from cibr.data.strings import Strings
from cibr.errors import UsageError

SIZES_READ = 1024  # files whose size enters the fingerprint: all of them would be slow over a network


class FileImages(Dataset):
    """Rows whose images are files, by path."""

    def __init__(self, folder: Path, paths: list[str], max_pixels: int, **columns: object) -> None:
        super().__init__(**columns)  # type: ignore[arg-type]
        self.folder, self.paths, self.max_pixels = folder, Strings(paths), max_pixels

    def image(self, index: int) -> Image.Image:
        return decode(read_image_file(self.folder / self.paths[index]), self.max_pixels)

    def sizes(self) -> np.ndarray:
        """Of up to 1,024 files, spread evenly."""
        rows = range(0, len(self), max(1, len(self) // SIZES_READ))
        return np.array([_size(self.folder / self.paths[row]) for row in rows], np.int64)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1


def open_csv(place: str, options: DataOptions, split: str) -> Dataset:
    """Relative paths are to the file's folder. Raises UsageError for a missing file or column and an open quote."""
    path = Path(place)
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    image_column = options.image_column or "filepath"
    caption_column = options.caption_column or "title"
    captions: dict[str, list[str]] = {}
    listing = Listing()
    for line, row in rows(path, options.separator, (image_column, caption_column), listing):
        with listing.row(f"line {line} of {path.name}"):
            image, caption = row
            if not image.strip():
                raise SkipSample("no image")
            texts = clean([caption])
            captions.setdefault(image.strip(), []).extend(texts)
    for image, own in list(captions.items())[: options.limit]:
        listing.add(image, tuple(own), None, image)
    return FileImages(path.parent, listing.places, options.max_pixels, **listing.columns())


def rows(
    path: Path, separator: str | None, columns: tuple[str, ...], listing: Listing
) -> Iterator[tuple[int, list[str]]]:
    """(line number, the named columns) of each row. Raises UsageError for a column that is not there."""
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        header = file.readline()
        file.seek(0)
        if separator is None:
            separator = "\t" if "\t" in header else ","
        reader = csv.reader(file, delimiter=separator.replace("\\t", "\t"), strict=True)
        names = next(_parsed(reader, path, listing), [])
        for column in columns:
            if column not in names:
                raise UsageError(
                    f"{path} has no column {column!r} but {', '.join(map(repr, names)) or 'nothing'}; "
                    "say which are which: --image-column, --caption-column, --separator"
                )
        places = [names.index(column) for column in columns]
        for row in _parsed(reader, path, listing):
            if len(row) > max(places):
                yield reader.line_num, [row[place] for place in places]
            elif row:
                listing.skipped.add("row with too few columns", f"line {reader.line_num} of {path.name}")


def _parsed(reader: Any, path: Path, listing: Listing) -> Iterator[list[str]]:
    """Rows; one that cannot be parsed is skipped if it is a line, and an error if it swallowed others."""
    while True:
        before = reader.line_num
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > before + 1:
                raise UsageError(
                    f"{path}, line {before + 1}: {error}; is a quote opened there that is never closed?"
                ) from error
            listing.skipped.add("row that is no csv", f"line {reader.line_num} of {path.name}")
