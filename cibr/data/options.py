"""Every option of a data set, with the help text that its command-line option shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cibr.config import option
from cibr.errors import UsageError

READ_BY = {  # options of some kinds of data only
    "hold_out": ("emoji", "features"),
    "unseen_fraction": ("emoji",),
    "image_column": ("csv", "hf"),
    "caption_column": ("csv", "hf", "webdataset"),
    "separator": ("csv",),
    "hf_split": ("hf",),
}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Raises UsageError for values that make no sense."""

    data: str = option(
        "",
        "KIND:PLACE: emoji:DIR, webdataset:GLOB_OR_URL, csv:FILE, folder:DIR, hf:NAME, features:FILE",
        changeable=True,
    )
    image_column: str | None = option(None, "column of image paths; default filepath (csv), the image column (hf)")
    caption_column: str | None = option(None, "column of captions; default title (csv), or caption(s) or text (hf)")
    separator: str | None = option(None, "between columns of a csv; default a tab if the header has one, else a comma")
    hf_split: str | None = option(None, "split of an hf data set; default train to train on, else test or validation")
    hold_out: str | None = option(None, "drawings: vendor family or style that training must not see")
    unseen_fraction: float = option(
        0.1, "emoji: share of the concepts kept from training, of every vendor", least=0, below=1
    )
    split_by: Literal["rows", "classes"] | None = option(
        None, "divide the data into train, val and test at random; by classes, those of val and test are not trained on"
    )
    split_seed: int = option(0, "of --split-by", least=0)
    val_share: float = option(0.1, "of --split-by: share of the rows or classes to validate on", least=0, below=1)
    test_share: float = option(0.2, "of --split-by: share of the rows or classes to test on", least=0, below=1)
    limit: int | None = option(None, "use only the first so many samples (emoji: concepts)", least=1)
    shots: int | None = option(None, "train on so many samples of each class only, drawn by --shot-seed", least=1)
    shot_seed: int = option(0, "of the draw", least=0)
    classes: Literal["all", "base", "new"] = option(
        "all", "base: only the first half of the classes, in order and rounded up; new: the rest"
    )
    mask_duplicates: bool = option(True, "pairs of equal captions or classes are no negatives of each other")
    augment: Literal["auto", "model", "drawing", "none"] = option(
        "auto", "model: its own; drawing: zoom, shift, turn, mirror, recolour; none; or auto"
    )
    max_pixels: int = option(89_478_485, "images with more are skipped, unread", least=1)
    workers: int | None = option(
        None, "processes that make batches; default one less than the cores, at most 8", least=0, changeable=True
    )
    prefetch: int = option(2, "batches each worker makes ahead", least=1, changeable=True)

    def __post_init__(self) -> None:
        if self.split_by is not None and self.val_share + self.test_share >= 1:
            shares = f"--val-share {self.val_share} and --test-share {self.test_share}"
            raise UsageError(f"{shares} leave nothing to train on")
        if self.separator is not None and len(self.separator.replace("\\t", "\t")) != 1:
            raise UsageError(f"--separator is {self.separator!r}, but must be one character")


def require_read(options: DataOptions) -> None:
    """Raises UsageError for an option that data of this kind would ignore: whoever set it believes in it."""
    kind, colon, _ = options.data.partition(":")
    for name, kinds in READ_BY.items():
        if colon and kind not in kinds and getattr(options, name) != getattr(DataOptions(), name):
            raise UsageError(f"--{name.replace('_', '-')} is an option of {' and '.join(kinds)} data, not of {kind}")
