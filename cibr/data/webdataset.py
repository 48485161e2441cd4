"""Tars of pairs in img2dataset's layout and clip_benchmark's: an image, and .txt, .json or .cls beside it."""

from __future__ import annotations

import glob
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from cibr.data.dataset import Dataset, SkipSample
from cibr.data.images import decode
from cibr.data.listing import Listing, names_and_templates
from cibr.data.options import DataOptions
from cibr.data.tar_index import index_of
from cibr.errors import UsageError


class TarImages(Dataset):
    """Rows whose images lie in tars, each read alone."""

    def __init__(self, tars: list[Path], listing: Listing, max_pixels: int, **columns: object) -> None:
        super().__init__(**columns)  # type: ignore[arg-type]
        self.tars, self.max_pixels = tars, max_pixels
        self.places = np.array(listing.places, np.int64).reshape(-1, 3)  # (n, 3): tar, offset, size

    def image(self, index: int) -> Image.Image:
        return decode(self.encoded(index), self.max_pixels)

    def encoded(self, index: int) -> bytes:
        """The image's file."""
        tar, offset, size = self.places[index].tolist()
        try:
            with self.tars[tar].open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise SkipSample(f"tar that cannot be opened ({type(error).__name__})") from error

    def sizes(self) -> np.ndarray:
        return self.places[:, 2]


def find_tars(place: str, split: str) -> list[Path]:
    """The tars of a folder, of its subfolder `split`, or of a glob or braces. Raises UsageError if there is none."""
    if Path(place).is_dir():
        tars = sorted(Path(place).glob("*.tar")) or sorted((Path(place) / split).glob("*.tar"))
        if not tars:
            raise UsageError(f"{place} holds no .tar, nor does a folder {split} in it")
        return tars
    from braceexpand import braceexpand

    tars = sorted({Path(name) for pattern in braceexpand(place) for name in glob.glob(pattern)})
    if not tars:
        raise UsageError(f"there is no file or folder {place}")
    for tar in tars:
        if not tar.is_file() or tar.suffix != ".tar":
            raise UsageError(f"{tar} is no .tar file; a compressed one can be streamed: pipe:gzip -dc {tar}")
    return tars


def open_webdataset(place: str, options: DataOptions, split: str) -> Dataset:
    """Local tars by index; urls and pipes as a stream."""
    if place.startswith("pipe:") or "://" in place:
        from cibr.data.stream import Stream

        return Stream(place, options)
    tars = find_tars(place, split)
    listing = Listing(options.limit)
    for number, tar in enumerate(tqdm(tars, desc="listing", unit="tar", leave=False, delay=2, disable=None)):
        if listing.full:
            break
        try:
            index_of(tar, options.caption_column).add_to(listing, number)
        except OSError as error:
            listing.skipped.add(f"tar that cannot be opened ({type(error).__name__})", tar.name)
    names, templates = names_and_templates(tars[0].parent, tars[0].parent.parent)
    columns = listing.columns(names, templates)
    return TarImages(tars, listing, options.max_pixels, **columns)
