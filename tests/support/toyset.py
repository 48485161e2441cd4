"""A small set in the format of `cibr data emoji`: 24 coloured shapes in four styles of three families."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
STYLES = {"plain": "round-house", "thick": "round-house", "small": "little-house", "framed": "frame-house"}
CONCEPTS = [f"{colour}-{shape}" for shape, colour in itertools.product(SHAPES, COLOURS)]


def draw(concept: str, style: str, size: int) -> bytes:
    colour, shape = concept.split("-")
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    margin = size * {"plain": 0.1, "thick": 0.15, "small": 0.3, "framed": 0.2}[style]
    low, high, middle = margin, size - margin, size / 2
    outline: dict[str, Any] = {"outline": "grey", "width": size // 8} if style == "thick" else {}
    if style == "framed":
        pen.rectangle((0, 0, size - 1, size - 1), outline="black", width=2)
    if shape == "circle":
        pen.ellipse((low, low, high, high), fill=colour, **outline)
    elif shape == "square":
        pen.rectangle((low, low, high, high), fill=colour, **outline)
    elif shape == "triangle":
        pen.polygon(((middle, low), (high, high), (low, high)), fill=colour)
    else:
        pen.line((low, low, high, high), fill=colour, width=size // 6)
        pen.line((low, high, high, low), fill=colour, width=size // 6)
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def about(concept: str, style: str, group: str = "shapes") -> dict[str, object]:
    label = concept.replace("-", " ")
    return {
        "concept": concept,
        "style": style,
        "family": STYLES[style],
        "label": label,
        "keywords": [*label.split(), "shape"],
        "group": group,
    }


def build(directory: Path, size: int = 32) -> Path:
    """Writes a tar per style and returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for style in STYLES:
        with tarfile.open(directory / f"{style}.tar", "w") as tar:
            for concept in CONCEPTS:
                add(tar, f"{concept}_{style}.png", draw(concept, style, size))
                add(tar, f"{concept}_{style}.json", json.dumps(about(concept, style)).encode())
    (directory / "set.json").write_text("{}")
    return directory
