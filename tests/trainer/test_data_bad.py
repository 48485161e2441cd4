"""Bad data: every case of the campaign, and what the pictures that are odd but whole look like."""

from __future__ import annotations

import contextlib
import json
import random
import tracemalloc
from pathlib import Path

import bad_data
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from cibr.data import DataOptions, in_order, open_dataset
from cibr.data.dataset import Skipped, SkipSample
from cibr.data.emoji import checked_drawing
from cibr.data.images import decode
from cibr.data.listing import captions_and_class
from cibr.errors import UsageError


@pytest.mark.parametrize("case", bad_data.CASES, ids=lambda case: case.name)
def test_campaign(case: bad_data.Case, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path != folder}
    tracemalloc.start()
    found = bad_data.run(case, folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bad_data.as_expected(case, found), found
    assert peak < 32 << 20  # nothing in a data set takes the memory
    written = {path for path in tmp_path.iterdir() if path not in before} - {folder, tmp_path / "cache"}
    assert not written  # nor writes beside it


def test_nothing_of_a_damaged_tar_is_lost_unnoticed(tmp_path: Path) -> None:
    """Two hundred times a bit, a part or the end of a tar is spoilt; whatever is missing then was counted."""
    bad_data.tar_of(pairs=12)(tmp_path)
    whole = (tmp_path / "0.tar").read_bytes()
    lost = 0
    for seed in range(200):
        rng = random.Random(seed)
        data, at, length = bytearray(whole), rng.randrange(len(whole) - 2000), rng.randint(1, 3000)
        kind = rng.choice(["bit", "noise", "zeros", "cut"])
        if kind == "bit":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[at:]
        else:
            data[at : at + length] = rng.randbytes(length) if kind == "noise" else bytes(length)
        (tmp_path / "0.tar").write_bytes(data)
        options = DataOptions(data=f"webdataset:{tmp_path}", workers=0)
        try:
            dataset = open_dataset(options)
        except UsageError as error:
            assert "no usable sample" in str(error)
            continue
        found = [batch["index"] for batch in in_order(dataset, options, batch_size=12, transform=bad_data.size)]
        if sum(map(len, found)) < 12:
            lost += 1
            assert dataset.skipped.total, (seed, kind, at)
    assert lost > 100


def test_the_names_of_bad_cases_are_distinct() -> None:
    assert len({case.name for case in bad_data.CASES}) == len(bad_data.CASES) > 50


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = ("caption", "captions", "cls", "concept", "style", "family", "label", "keywords", "group")


@given(st.dictionaries(st.sampled_from(ENTRIES), JSON), st.none() | st.sampled_from(ENTRIES))
@settings(max_examples=300, deadline=None)
def test_any_json_is_taken_or_skipped(about: dict[str, object], key: str | None) -> None:
    with contextlib.suppress(SkipSample):
        captions, named = captions_and_class({"json": json.dumps(about).encode()}, key)
        assert captions or named is not None
        assert all(isinstance(text, str) and text.strip() == text != "" for text in captions)
    with contextlib.suppress(SkipSample):
        entry = checked_drawing(about)
        assert entry["label"] and all(isinstance(word, str) for word in entry["keywords"])


@given(st.binary(max_size=60), st.sampled_from(["txt", "cls", "json"]))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_taken_or_skipped(data: bytes, ending: str) -> None:
    with contextlib.suppress(SkipSample):
        captions_and_class({ending: data})
    with contextlib.suppress(SkipSample):
        decode(data, 10_000)


def test_names_are_printed_without_control_characters() -> None:
    skipped = Skipped()
    skipped.add("no image", "a\x1b[2J\nb" + 1000 * "c")
    assert skipped.first["no image"][:9] == "a?[2J?bcc" and len(str(skipped)) < 300


def read(image: Image.Image, kind: str = "PNG", **options: object) -> Image.Image:
    found = decode(bad_data.encode(image, kind, **options), 10_000)
    assert found.mode == "RGB"
    return found


def test_16_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    for kind in ("PNG", "TIFF"):
        found = np.asarray(read(Image.fromarray(ramp), kind))
        assert (found == np.round(ramp / 257)[..., None]).all() and found.max() == 255
    assert len(np.unique(found)) == 64
    wide = Image.fromarray(np.full((8, 8), 70_000, np.int32))
    with pytest.raises(SkipSample, match="more than 16 bits"):
        read(wide, "TIFF")


def test_what_is_transparent_is_white() -> None:
    white, half = (255, 255, 255), Image.new("RGBA", (8, 8), (0, 0, 255, 128))
    assert read(Image.new("RGBA", (8, 8), (255, 0, 0, 0))).getpixel((0, 0)) == white
    assert read(Image.new("LA", (8, 8), (0, 0))).getpixel((0, 0)) == white
    assert read(half).getpixel((0, 0)) == (127, 127, 255)
    palette = Image.new("P", (8, 8))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    found = read(palette, transparency=0)
    assert found.getpixel((0, 0)) == white and found.getpixel((1, 0)) == (255, 0, 0)
    assert read(Image.new("RGB", (8, 8)), transparency=(0, 0, 0)).getpixel((0, 0)) == white


def test_a_photo_held_on_its_side_is_upright() -> None:
    image = Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 8, 8))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees clockwise to be seen
    for kind in ("PNG", "JPEG", "WEBP"):
        found = read(image, kind, exif=exif)
        assert found.size == (8, 16)
        assert max(found.getpixel((4, 3))) < 40 and min(found.getpixel((4, 12))) > 215  # type: ignore[arg-type,type-var]
    damaged = bad_data.encode(image, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    assert decode(damaged, 10_000).size == (16, 8)


def test_cmyk_palette_and_animation() -> None:
    red = read(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG").getpixel((4, 4))
    assert red[0] > 240 and max(red[1:]) < 20  # type: ignore[index]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        first = read(bad_data.FRAMES[0], kind, save_all=True, append_images=bad_data.FRAMES[1:])
        assert first.getpixel((4, 4)) in ((255, 0, 0), (255, 1, 0), (254, 0, 0))
    assert read(Image.new("1", (8, 8), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert read(Image.new("L", (8, 8), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    large = bad_data.encode(Image.new("1", (300, 300)))
    assert decode(large, 90_000).size == (300, 300)
    monkeypatch.setattr(PngImageFile, "load", None)
    with pytest.raises(SkipSample, match="too many pixels"):
        decode(large, 89_999)
