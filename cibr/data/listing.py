"""The rows of a data set while they are found: what each says of itself, checked, and what is left out, counted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cibr.data.dataset import Skipped, SkipSample
from cibr.errors import UsageError

MAX_CAPTION = 10_000  # characters; a tokenizer keeps some dozens of words
MAX_TEXT_BYTES = 1 << 20  # of a .txt, .json or .cls
TEMPLATE = "a photo of a {}."


def clean(captions: Any) -> tuple[str, ...]:
    """Captions less surrounding space and empty ones. Raises SkipSample for what is no text and where none is left."""
    if not isinstance(captions, (list, tuple)):
        raise SkipSample("captions that are no list of texts")
    kept = []
    for caption in captions:
        if not isinstance(caption, str):
            raise SkipSample("caption that is no text")
        if len(caption) > MAX_CAPTION:
            raise SkipSample("caption longer than 10,000 characters")
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise SkipSample("caption that is not UTF-8") from error
        if caption.strip():
            kept.append(caption.strip())
    if not kept:
        raise SkipSample("no caption")
    return tuple(kept)


def decode_text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SkipSample("caption that is not UTF-8") from error


def decode_json(data: bytes) -> dict[str, Any]:
    """The object in a .json. Raises SkipSample if there is none."""
    try:
        about = json.loads(decode_text(data))
    except (ValueError, RecursionError) as error:
        raise SkipSample("damaged .json") from error
    if not isinstance(about, dict):
        raise SkipSample(".json that is no object")
    return about


def captions_and_class(
    members: Mapping[str, bytes], caption_key: str | None = None
) -> tuple[tuple[str, ...], str | int | None]:
    """What the `.txt`, `.json` and `.cls` of a sample, by ending, say: captions, maybe none, and a class or None.

    Captions come from the .json's `caption_key`, or its `captions`, or the lines of .txt, or the .json's `caption`.
    Raises SkipSample where there is neither caption nor class, and for what cannot be read.
    """
    about = decode_json(members["json"]) if "json" in members else {}
    if caption_key is not None and caption_key in about:
        captions = about[caption_key]
    elif "captions" in about:
        captions = about["captions"]
    elif "txt" in members:
        captions = decode_text(members["txt"]).splitlines()
    else:
        captions = about.get("caption")
    named = _class(members, about)
    if captions is None and named is not None:
        return (), named  # captions are made from the class's name
    return clean([captions] if isinstance(captions, str) else captions or ()), named


def _class(members: Mapping[str, bytes], about: Mapping[str, Any]) -> str | int | None:
    if "cls" in members:
        text = decode_text(members["cls"]).strip()
        return int(text) if text.isdecimal() else checked_class(text)
    return checked_class(about["cls"]) if "cls" in about else None


def checked_class(named: object) -> str | int:
    """A class's number or name. Raises SkipSample for null and what else names none."""
    if named is None or named == "":
        raise SkipSample("class of null")
    if isinstance(named, bool) or not isinstance(named, (str, int)):
        raise SkipSample("class that is neither a name nor a number")
    return named


class Listing:
    """Rows as they are found. `places` is whatever the source needs to read a row's image."""

    def __init__(self, limit: int | None = None) -> None:
        self.keys: list[str] = []
        self.captions: list[tuple[str, ...]] = []
        self.classes: list[str | int | None] = []
        self.places: list[Any] = []
        self.skipped = Skipped()
        self.limit = limit

    @property
    def full(self) -> bool:
        return self.limit is not None and len(self.keys) >= self.limit

    def add(self, key: str, captions: tuple[str, ...], named: str | int | None, place: Any) -> None:
        self.keys.append(key)
        self.captions.append(captions)
        self.classes.append(named)
        self.places.append(place)

    @contextmanager
    def row(self, name: str) -> Iterator[None]:
        """A block that lists one row: a SkipSample in it counts the row as left out."""
        try:
            yield
        except SkipSample as reason:
            self.skipped.add(str(reason), name)

    def columns(self, class_names: list[str] | None = None, templates: list[str] | None = None) -> dict[str, Any]:
        """The arguments of `Dataset`; rows whose class is missing or not in `class_names` are left out."""
        if all(named is None for named in self.classes):
            return {"keys": self.keys, "captions": self.captions, "skipped": self.skipped}
        names = class_names or sorted({str(named) for named in self.classes if named is not None})
        number = {name: k for k, name in enumerate(names)}
        labels = []
        for key, named in zip(self.keys, self.classes, strict=True):
            if class_names is not None and isinstance(named, int):
                labels.append(named if 0 <= named < len(names) else None)
            else:
                labels.append(number.get(str(named)) if named is not None else None)
            if labels[-1] is None:
                reason = "no class, where others have one" if named is None else "class that is not among the names"
                self.skipped.add(reason, key)
        kept = [k for k, label in enumerate(labels) if label is not None]
        self.places = [self.places[k] for k in kept]
        return {
            "keys": [self.keys[k] for k in kept],
            "captions": [self.captions[k] for k in kept],
            "labels": [labels[k] for k in kept],
            "class_names": class_names or [name.replace("_", " ") for name in names],
            "templates": templates or [TEMPLATE],
            "skipped": self.skipped,
        }


def names_and_templates(*folders: Path) -> tuple[list[str] | None, list[str] | None]:
    """clip_benchmark's classnames.txt and zeroshot_classification_templates.txt of the first folder that has them.

    Raises UsageError for a template without a place for the name.
    """
    names = _lines("classnames.txt", folders)
    templates = _lines("zeroshot_classification_templates.txt", folders)
    templates = templates and [template.replace("{c}", "{}") for template in templates]
    for template in templates or ():
        if "{}" not in template:
            raise UsageError(f"the template {template!r} has no {{}} or {{c}} for the class name")
    return names, templates


def _lines(file: str, folders: Iterable[Path]) -> list[str] | None:
    for folder in folders:
        if (folder / file).is_file():
            return [line.strip() for line in (folder / file).read_text("utf-8").splitlines() if line.strip()]
    return None
