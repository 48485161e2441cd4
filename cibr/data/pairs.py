"""Image-text pairs in memory, split by vendor and by concept, and drawn by concept.

Every sample of the tars is an image and a .json with `concept`, `style`, `family`, `label`, `keywords` and `group`. Two
styles' drawings of a concept are false negatives of each other, so a batch draws distinct concepts, then their styles.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cibr.errors import UsageError, missing_extra


@dataclass(frozen=True)
class Concept:
    key: str
    label: str
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class Pairs:
    """All images with what they show and who drew them."""

    images: torch.Tensor  # (n, 3, size, size) uint8
    concept: np.ndarray  # (n,) index into concepts
    style: np.ndarray  # (n,) index into styles
    concepts: tuple[Concept, ...]
    styles: tuple[str, ...]
    families: tuple[str, ...]  # the family of each style
    skipped: int  # samples that could not be read

    def rows(self, concepts: Collection[int], styles: Collection[int]) -> np.ndarray:
        """The rows whose concept and style are among the given ones, ascending."""
        return np.flatnonzero(np.isin(self.concept, list(concepts)) & np.isin(self.style, list(styles)))


def load(
    data: Path, *, image_size: int = 64, drop_groups: Collection[str] = ("flags",), limit: int | None = None
) -> Pairs:
    """Reads every .tar under `data` into memory, resized to `image_size` pixels, concepts in the order of their keys.

    `limit` keeps the first so many concepts. A sample that cannot be read is skipped, counted and warned about;
    a tar cut short ends there. Raises UsageError when there is no folder, no tar or nothing readable in them.
    """
    try:
        import webdataset
        from PIL import Image
    except ImportError as error:
        raise missing_extra(error) from error
    if not data.is_dir():
        raise UsageError(f"there is no folder {data}; `cibr data emoji --out {data}` builds one")
    tars = sorted(str(path) for path in data.glob("*.tar"))
    if not tars:
        raise UsageError(f"{data} holds no .tar; `cibr data emoji --out DIR` builds a set")
    problems: list[str] = []

    def skip(error: Exception) -> bool:
        problems.append(f"{type(error).__name__}: {error}")
        return True

    def decode(sample: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        about = json.loads(sample["json"])
        about = {key: about[key] for key in ("concept", "style", "family", "label", "keywords", "group")}
        encoded = next(sample[kind] for kind in ("png", "jpg", "jpeg", "webp") if kind in sample)
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        if image.size != (image_size, image_size):
            image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
        return np.asarray(image), about

    # every rank reads everything (nodesplitter): batches are drawn from the whole
    shards = webdataset.WebDataset(tars, handler=skip, shardshuffle=False, empty_check=False, nodesplitter=None)
    read = [(i, a) for i, a in shards.map(decode, handler=skip) if a["group"] not in drop_groups]
    if problems:
        warnings.warn(f"{len(problems)} samples of {data} skipped, the first: {problems[0]}", stacklevel=2)
    keys = sorted({about["concept"] for _, about in read})[:limit]
    read = sorted(
        ((i, a) for i, a in read if a["concept"] in set(keys)), key=lambda pair: (pair[1]["concept"], pair[1]["style"])
    )
    if not read:
        raise UsageError(f"no readable sample in {data} ({len(problems)} skipped)")
    about_of = {about["concept"]: about for _, about in read}
    family_of = {about["style"]: about["family"] for _, about in read}
    styles = tuple(sorted(family_of))
    return Pairs(
        images=torch.from_numpy(np.stack([image for image, _ in read])).permute(0, 3, 1, 2).contiguous(),
        concept=np.array([keys.index(about["concept"]) for _, about in read]),
        style=np.array([styles.index(about["style"]) for _, about in read]),
        concepts=tuple(Concept(key, about_of[key]["label"], tuple(about_of[key]["keywords"])) for key in keys),
        styles=styles,
        families=tuple(family_of[style] for style in styles),
        skipped=len(problems),
    )


@dataclass(frozen=True)
class Split:
    """What training may see: `seen` concepts in `train_styles`. Everything else is for evaluation."""

    seen: tuple[int, ...]  # concept indices
    unseen: tuple[int, ...]
    train_styles: tuple[int, ...]  # style indices
    test_styles: tuple[int, ...]  # the vendor held out; empty without one


def split(pairs: Pairs, hold_out: str | None, unseen_fraction: float = 0.1) -> Split:
    """Holds out a vendor and, of every vendor, `unseen_fraction` of the concepts (by hash: the same for every seed).

    `hold_out` names a family or a style. Training sees no style of that family either way; a style named alone is the
    one tested on. Raises UsageError for a name that is neither, and when nothing is left to train on.
    """
    known = [*dict.fromkeys(pairs.families), *(s for s in pairs.styles if s not in pairs.families)]
    if hold_out is not None and hold_out not in known:
        raise UsageError(f"--hold-out {hold_out!r} is neither a family nor a style here; known are {', '.join(known)}")
    if hold_out is None or hold_out in pairs.families:
        family, tested = hold_out, [s for s, f in enumerate(pairs.families) if f == hold_out]
    else:
        tested = [pairs.styles.index(hold_out)]
        family = pairs.families[tested[0]]
    train_styles = tuple(s for s, f in enumerate(pairs.families) if f != family)
    if not train_styles:
        raise UsageError(f"--hold-out {hold_out!r} leaves no style to train on; the only family here is {family!r}")
    by_hash = sorted(range(len(pairs.concepts)), key=lambda c: hashlib.sha256(pairs.concepts[c].key.encode()).digest())
    unseen = set(by_hash[: round(unseen_fraction * len(by_hash))])
    seen = tuple(c for c in range(len(by_hash)) if c not in unseen)
    return Split(seen, tuple(sorted(unseen)), train_styles, tuple(tested))


class ConceptSampler:
    """Draws batches of distinct concepts, then one row of each; a draw depends on its random generator alone."""

    def __init__(self, concept: np.ndarray, rows: np.ndarray, batch_size: int) -> None:
        """`concept` (n,) is the concept of every row, `rows` (m,) the rows to draw from."""
        self.rows = rows[np.argsort(concept[rows], kind="stable")]
        _, self.first, self.count = np.unique(concept[self.rows], return_index=True, return_counts=True)
        self.batch_size = batch_size
        if batch_size > len(self.count):
            raise UsageError(
                f"--batch-size {batch_size} is more than the {len(self.count)} concepts there are to train on"
            )

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """(batch_size,) rows."""
        chosen = rng.choice(len(self.count), self.batch_size, replace=False)
        return self.rows[self.first[chosen] + (rng.random(self.batch_size) * self.count[chosen]).astype(np.int64)]


def augment(
    images: torch.Tensor, rng: np.random.Generator, *, part: slice = slice(None), total: int | None = None
) -> torch.Tensor:
    """Zooms, shifts, turns and mirrors (n, 3, size, size) floats in [0, 1] on white at random, and recolours half.

    `images` may be a `part` of a batch of `total`: the random numbers are then those of the whole batch.
    """
    n = len(images) if total is None else total
    zoom = rng.uniform(0.85, 1.5, n)  # > 1 shrinks the drawing: vendors leave different margins
    turn = rng.uniform(-0.15, 0.15, n)
    mirror = rng.choice([-1.0, 1.0], n)
    theta = np.zeros((n, 2, 3), np.float32)
    theta[:, 0, 0], theta[:, 0, 1] = mirror * zoom * np.cos(turn), -zoom * np.sin(turn)
    theta[:, 1, 0], theta[:, 1, 1] = mirror * zoom * np.sin(turn), zoom * np.cos(turn)
    theta[:, :, 2] = rng.uniform(-0.15, 0.15, (n, 2))
    grid = torch.nn.functional.affine_grid(torch.from_numpy(theta[part]), list(images.shape), align_corners=False)
    ink = torch.nn.functional.grid_sample(1 - images, grid, align_corners=False)  # zero padding is white paper
    strength = torch.from_numpy((rng.uniform(0, 1, n) * rng.integers(0, 2, n)).astype(np.float32))[part]
    # rows sum to 1: white stays, grey stays
    mix = torch.from_numpy(rng.dirichlet(np.ones(3), (n, 3)).astype(np.float32))[part]
    recoloured = torch.einsum("nij,njhw->nihw", mix, ink)
    return 1 - torch.lerp(ink, recoloured, strength.view(-1, 1, 1, 1))
