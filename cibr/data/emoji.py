"""The emoji set as pairs: split by vendor and by concept, drawn by concept, its images decoded once and kept.

Every sample of the tars is an image and a .json with `concept`, `style`, `family`, `label`, `keywords` and `group`. Two
styles' drawings of a concept are false negatives of each other, so a batch takes distinct concepts, then their styles.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cibr.data.dataset import Dataset, Skipped, SkipSample
from cibr.data.images import decode
from cibr.data.listing import Listing, clean, decode_json
from cibr.data.options import DataOptions
from cibr.data.tar_index import cache_home
from cibr.data.tars import image_place, samples
from cibr.errors import UsageError
from cibr.run.atomic import atomic_directory

DROPPED = ("flags",)  # groups left out: a flag's drawing says nothing of its country's name
CAPTIONS = 6  # at most so many of a drawing, where all are asked for
SPLITS = ("train", "held_out", "unseen", "unseen_held_out", "all")


@dataclass(frozen=True)
class Drawings:
    """All drawings of a set, in the order of their concepts."""

    images: np.ndarray  # (n, side, side, 3) uint8, mapped into memory where it was cached
    about: list[dict[str, Any]]  # of each drawing: key, concept, style, family, label, keywords, bytes
    skipped: Skipped


class Emoji(Dataset):
    """A split's drawings; the classes are its concepts, those without a drawing in it included."""

    distinct_groups = True
    augment = "drawing"

    def __init__(self, drawings: Drawings, rows: list[int], concepts: list[str]) -> None:
        about = [drawings.about[row] for row in rows]
        self.keywords = {entry["concept"]: entry["keywords"] for entry in drawings.about}
        label = {entry["concept"]: entry["label"] for entry in drawings.about}
        number = {concept: k for k, concept in enumerate(concepts)}
        self.images, self.rows, self.concepts = drawings.images, rows, concepts
        self.bytes = np.array([entry["bytes"] for entry in about], np.int64)
        super().__init__(
            [entry["key"] for entry in about],
            [(entry["label"],) for entry in about],
            labels=[number[entry["concept"]] for entry in about],
            class_names=[label[concept] for concept in concepts],
            templates=["{}"],
            styles=[entry["style"] for entry in about],
            skipped=drawings.skipped,
        )

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[self.rows[index]])

    def captions(self, index: int) -> tuple[str, ...]:
        """The label, and what the first draws of CAPTIONS - 1 numbers say: the same for all drawings of a concept."""
        more = (self.draw(index, number) for number in range(1, CAPTIONS))
        return tuple(dict.fromkeys([self.texts[index][0], *more]))

    def draw(self, index: int, number: int) -> str:
        """The label, the label with one to three keywords, or keywords, in 5, 3 and 2 of 10 draws."""
        assert self.labels is not None
        rng = random.Random(number)
        label, keywords = self.texts[index][0], self.keywords[self.concepts[int(self.labels[index])]]
        words = rng.sample(keywords, min(len(keywords), rng.randint(1, 3)))
        kind = rng.random()
        return " ".join([label] if kind < 0.5 or not words else [label, *words] if kind < 0.8 else words)

    def words(self) -> Iterable[str]:
        for concept, label in zip(self.concepts, self.class_names or (), strict=True):
            yield from (label, *self.keywords[concept])

    def sizes(self) -> np.ndarray:
        return self.bytes


def open_emoji(place: str, options: DataOptions, split: str) -> Dataset:
    """A split: `train`, `held_out` (the vendor kept from training, `test` for short), `unseen` (concepts kept from it),
    `unseen_held_out`, or `all`. Raises UsageError for what is not there, and a split that is empty.
    """
    root = Path(place)
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}; `cibr data emoji --out {root}` builds one")
    tars = sorted(root.glob("*.tar"))
    if not tars:
        raise UsageError(f"{root} holds no .tar; `cibr data emoji --out DIR` builds a set")
    split = "held_out" if split == "test" else split
    if split not in SPLITS:
        raise UsageError(f"the emoji have no split {split!r}; known are {', '.join(SPLITS)}")
    if split.endswith("held_out") and options.hold_out is None:
        raise UsageError(f"the split {split!r} of the emoji needs a vendor: --hold-out FAMILY_OR_STYLE")
    drawings = load_drawings(tars, options.max_pixels)
    concepts = list(dict.fromkeys(entry["concept"] for entry in drawings.about))[: options.limit]
    unseen = unseen_concepts(concepts, options.unseen_fraction)
    training, tested = split_styles(drawings.about, options.hold_out)
    if split != "all":
        concepts = [concept for concept in concepts if (concept in unseen) == split.startswith("unseen")]
    styles = tested if split.endswith("held_out") else training | tested if split == "all" else training
    chosen = set(concepts)
    rows = [k for k, e in enumerate(drawings.about) if e["concept"] in chosen and e["style"] in styles]
    return Emoji(drawings, rows, concepts)


def unseen_concepts(concepts: list[str], fraction: float) -> set[str]:
    """The share of the concepts that training must not see, by hash: the same for every seed."""
    by_hash = sorted(concepts, key=lambda concept: hashlib.sha256(concept.encode()).digest())
    return set(by_hash[: round(fraction * len(by_hash))])


def split_styles(about: list[dict[str, Any]], hold_out: str | None) -> tuple[set[str], set[str]]:
    """Styles to train on and to test on, where `hold_out` names a family or a style.

    Training sees no style of that family either way; a style named alone is the one tested on. Raises UsageError for a
    name that is neither, and when nothing is left to train on.
    """
    family = {entry["style"]: entry["family"] for entry in sorted(about, key=lambda entry: entry["style"])}
    if hold_out is None:
        return set(family), set()
    families = list(dict.fromkeys(family.values()))
    if hold_out not in families and hold_out not in family:
        known = ", ".join([*families, *(style for style in family if style not in families)])
        raise UsageError(f"--hold-out {hold_out!r} is neither a family nor a style here; known are {known}")
    held = hold_out if hold_out in families else family[hold_out]
    training = {style for style in family if family[style] != held}
    if not training:
        raise UsageError(f"--hold-out {hold_out!r} leaves no style to train on; the only family here is {held!r}")
    return training, {hold_out} if hold_out not in families else set(family) - training


def load_drawings(tars: list[Path], max_pixels: int) -> Drawings:
    """The drawings of the tars, decoded, from the cache if they did not change since.

    The cache is in $XDG_CACHE_HOME/cibr or ~/.cache/cibr, one folder for each set, and is mapped into memory.
    """
    stats = [tar.stat() for tar in tars]
    key = repr([1, max_pixels, *((t.name, s.st_size, s.st_mtime_ns) for t, s in zip(tars, stats, strict=True))])
    home = cache_home()
    name = f"emoji-{_hash(str(tars[0].parent.resolve()))}"
    folder = home / f"{name}-{_hash(key)}"
    try:
        return _read_cache(folder)
    except (OSError, ValueError, KeyError):
        pass
    try:
        for old in home.glob(f"{name}-*"):
            shutil.rmtree(old, ignore_errors=True)
        with atomic_directory(folder) as work:
            _write_drawings(tars, max_pixels, work)
        return _read_cache(folder)
    except OSError:  # no place for a cache, or another process was first
        if folder.is_dir():
            return _read_cache(folder)
        with tempfile.TemporaryDirectory() as work:
            _write_drawings(tars, max_pixels, Path(work))
            return _read_cache(Path(work))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_cache(folder: Path) -> Drawings:
    found = json.loads((folder / "about.json").read_text())
    images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    skipped = Skipped()
    for reason, (count, first) in found["skipped"].items():
        skipped.add(reason, first, count)
    if len(images) != len(found["drawings"]):
        raise ValueError("the cache's files are of two sets")
    return Drawings(images, found["drawings"], skipped)


def _write_drawings(tars: list[Path], max_pixels: int, folder: Path) -> None:
    """Lists the tars, decodes what they hold to the first image's size, and writes images.npy and about.json."""
    listing = list_drawings(tars)
    order = sorted(range(len(listing.places)), key=lambda k: (listing.places[k][0]["concept"], listing.keys[k]))
    about: list[dict[str, Any]] = []
    stacked: np.ndarray | None = None
    for k in tqdm(order, desc="decoding, once", unit="image", leave=False, delay=2, disable=None):
        entry, tar, offset = listing.places[k]
        with listing.row(listing.keys[k]), tar.open("rb") as file:
            file.seek(offset)
            image = decode(file.read(entry["bytes"]), max_pixels)
            if stacked is None:
                side = max(image.size)
                shape = (len(order), side, side, 3)
                stacked = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)
            if image.size != stacked.shape[1:3]:
                image = image.resize(stacked.shape[1:3], Image.Resampling.BICUBIC)
            stacked[len(about)] = np.asarray(image)
            about.append({"key": listing.keys[k], **entry})
    if stacked is None or len(about) < len(stacked):
        whole = np.zeros((0, 1, 1, 3), np.uint8) if stacked is None else np.array(stacked[: len(about)])
        np.save(folder / "images.npy", whole)
    skipped = {reason: (count, listing.skipped.first[reason]) for reason, count in listing.skipped.counts.items()}
    (folder / "about.json").write_text(json.dumps({"drawings": about, "skipped": skipped}))


def list_drawings(tars: list[Path]) -> Listing:
    """Places are (what the .json says and the image's size in bytes, tar, offset)."""
    listing = Listing()
    for tar in tars:
        found = samples(tar, listing.skipped)
        with tar.open("rb") as file:
            for key, endings in found.items():
                with listing.row(f"{key} in {tar.name}"):
                    image = image_place(endings)
                    if "json" not in endings:
                        raise SkipSample("no .json")
                    file.seek(endings["json"].offset)
                    entry = checked_drawing(decode_json(file.read(endings["json"].size)))
                    if entry.pop("group") not in DROPPED:
                        listing.add(key, (), None, ({**entry, "bytes": image.size}, tar, image.offset))
    return listing


def checked_drawing(about: dict[str, Any]) -> dict[str, Any]:
    """The entries that make a drawing one. Raises SkipSample if one is missing or of another kind."""
    for name in ("concept", "style", "family", "label", "group"):
        if name not in about:
            raise SkipSample(f".json without {name}")
        if not isinstance(about[name], str) or not about[name].strip():
            raise SkipSample(f"{name} of null or that is no text")
    keywords = about.get("keywords") or ()
    entry = {name: about[name] for name in ("concept", "style", "family", "group")}
    return {**entry, "label": clean([about["label"]])[0], "keywords": list(clean(keywords)) if keywords else []}
