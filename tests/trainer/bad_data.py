"""The campaign of bad data: each case builds its files, of which all is read, skipped and counted, or refused.

    python tests/trainer/bad_data.py        # prints the table

`test_data_bad.py` holds every line of it.
"""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[2])]  # as a script

from cibr.data import Batches, DataOptions, in_order, open_dataset  # noqa: E402
from cibr.data.check import size  # noqa: E402
from cibr.errors import UsageError  # noqa: E402


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)  # type: ignore[arg-type]
    return data.getvalue()


def good(k: int = 0) -> bytes:
    return encode(Image.new("RGB", (8, 8), (40 * k, 0, 0)))


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a few bytes that claims 3.6 gigapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


Member = tuple[str, bytes]


def write_tar(path: Path, members: list[Member | tarfile.TarInfo]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                about = tarfile.TarInfo(member[0])
                about.size = len(member[1])
                tar.addfile(about, io.BytesIO(member[1]))


def pair(k: int, image: bytes | None = None, caption: bytes | None = None, ending: str = "png") -> list[Member]:
    return [(f"{k:03}.{ending}", good(k) if image is None else image), (f"{k:03}.txt", caption or b"caption %d" % k)]


Build = Callable[[Path], str]  # writes its files into a folder and returns the SPEC


@dataclass
class Case:
    name: str
    build: Build
    usable: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    refused: str = ""  # words of the refusal, if not before then when batches are to be made


def tar_of(*extra: Member | tarfile.TarInfo, pairs: int = 3) -> Build:
    """Three good pairs, then what else is in the tar."""

    def build(folder: Path) -> str:
        members: list[Member | tarfile.TarInfo] = [m for k in range(pairs) for m in pair(k)]
        write_tar(folder / "0.tar", [*members, *extra])
        return f"webdataset:{folder}"

    return build


def damaged(change: Callable[[bytearray], bytes | bytearray], pairs: int = 6) -> Build:
    def build(folder: Path) -> str:
        tar_of(pairs=pairs)(folder)
        path = folder / "0.tar"
        path.write_bytes(change(bytearray(path.read_bytes())))
        return f"webdataset:{folder}"

    return build


def flip_header(data: bytearray) -> bytearray:
    """One bit of the third pair's image's header: most readers end there without a word."""
    at = data.index(b"002.png")
    data[at + 1] ^= 1
    return data


def garbage(data: bytearray) -> bytearray:
    """Noise over the whole of the second and third pair."""
    begin, end = data.index(b"001.png"), data.index(b"003.png")
    data[begin:end] = bytes((k * 7919 + 13) % 251 + 1 for k in range(end - begin))
    return data


def hole(data: bytearray) -> bytearray:
    """Zeros over the second pair, as where a disk was full."""
    begin, end = data.index(b"001.png"), data.index(b"002.png")
    data[begin:end] = bytes(end - begin)
    return data


def joined(folder: Path) -> str:
    for k in range(2):
        write_tar(folder / f"{k}.part", [m for j in range(3) for m in pair(3 * k + j)])
    (folder / "0.tar").write_bytes((folder / "0.part").read_bytes() + (folder / "1.part").read_bytes())
    return f"webdataset:{folder}"


def huge_pax(data: bytearray) -> bytes:
    """A pax header that claims eight gigabytes, after good pairs."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 8 << 30
    body = data.rstrip(b"\0")
    return bytes(body.ljust(-(-len(body) // 512) * 512, b"\0")) + header.tobuf() + b"\0" * 4096


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def csv_of(text: bytes | str, *, also: Callable[[Path], None] = lambda folder: None) -> Build:
    def build(folder: Path) -> str:
        for k in range(3):
            (folder / f"{k}.png").write_bytes(good(k))
        also(folder)
        (folder / "pairs.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return f"csv:{folder / 'pairs.csv'}"

    return build


HEADER = "filepath,title\n0.png,none\n1.png,one\n2.png,two\n"


def special_files(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()


def odd_name(folder: Path) -> None:
    (folder / "\udcff.png").write_bytes(good(5))


def no_rights(folder: Path) -> None:
    """A link that leads to itself: unreadable for everybody, root included."""
    (folder / "loop.png").symlink_to(folder / "loop.png")


def folder_of(**classes: int) -> Build:
    def build(folder: Path) -> str:
        for name, count in classes.items():
            (folder / name).mkdir()
            for k in range(count):
                (folder / name / f"{k}.png").write_bytes(good(k))
        return f"folder:{folder}"

    return build


def empty_folder(folder: Path) -> str:
    write_tar(folder / "0.tar", [])
    return f"webdataset:{folder}"


def emoji_with_null(folder: Path) -> str:
    about = {"concept": "a", "style": "s", "family": "f", "label": "ant", "keywords": None, "group": "g"}
    members: list[Member | tarfile.TarInfo] = []
    for k, change in enumerate([{}, {"concept": "b"}, {"label": None}, {"keywords": [1]}, {"family": 3}]):
        members += [(f"{k}.png", good()), (f"{k}.json", json.dumps({**about, **change}).encode())]
    write_tar(folder / "s.tar", members)
    return f"emoji:{folder}"


def image_case(name: str, data: bytes, reason: str = "", ending: str = "png") -> Case:
    build = tar_of(*pair(9, data, ending=ending))
    return Case(name, build, usable=3 if reason else 4, skipped={reason: 1} if reason else {})


def text_case(name: str, text: bytes, reason: str = "", ending: str = "txt") -> Case:
    build = tar_of(("9.png", good()), (f"9.{ending}", text))
    return Case(name, build, usable=3 if reason else 4, skipped={reason: 1} if reason else {})


FRAMES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
WHITE_16 = Image.new("I;16", (8, 8), 65535)
JPEG = encode(Image.radial_gradient("L").convert("RGB"), "JPEG")

CASES = [
    image_case("image of zero bytes", b"", "image of zero bytes"),
    image_case("image that is text", b"not an image", "unreadable image (UnidentifiedImageError)"),
    image_case("JPEG cut in the middle", JPEG[: len(JPEG) // 2], "unreadable image (OSError)", "jpg"),
    image_case("PNG with a damaged chunk", good().replace(b"IDAT", b"IDAX"),
               "unreadable image (UnidentifiedImageError)"),
    image_case("1 x 1 image", encode(Image.new("RGB", (1, 1))), "image with a side of one pixel"),
    image_case("5000 x 2 image", encode(Image.new("1", (5000, 2))), "image more than 100 times as long as wide"),
    image_case("decompression bomb", bomb(), "image with too many pixels"),
    image_case("program in PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
               "unreadable image (UnidentifiedImageError)"),
    image_case("floating-point TIFF", encode(Image.new("F", (8, 8)), "TIFF"),
               "image of floating-point numbers, whose range is unknown", "tif"),
    image_case("CMYK JPEG", encode(Image.new("CMYK", (8, 8)), "JPEG"), ending="jpg"),
    image_case("16-bit PNG", encode(WHITE_16)),
    image_case("palette", encode(Image.new("P", (8, 8)))),
    image_case("transparent", encode(Image.new("RGBA", (8, 8)))),
    image_case("animated GIF", encode(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), ending="gif"),
    image_case("animated WebP", encode(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), ending="webp"),
    text_case("caption not in UTF-8", b"caf\xe9", "caption that is not UTF-8"),
    text_case("caption with a lone surrogate", b'{"caption": "\\ud800"}', "caption that is not UTF-8", "json"),
    text_case("empty caption", b" \n", "no caption"),
    text_case("very long caption", b"word " * 3000, "caption longer than 10,000 characters"),
    Case("caption of two megabytes", tar_of(("9.png", good()), ("9.txt", b"x" * (2 << 20))), 3,
         {"caption file larger than 1 MB": 1, "no caption": 1}),
    text_case("damaged .json", b'{"caption": ', "damaged .json", "json"),
    text_case(".json nested too deep", b"[" * 100_000, "damaged .json", "json"),
    text_case(".json that is a list", b"[]", ".json that is no object", "json"),
    text_case("caption of null", b'{"caption": null}', "no caption", "json"),
    text_case("caption that is a number", b'{"captions": [3]}', "caption that is no text", "json"),
    text_case("captions that are an object", b'{"captions": {"a": 1}}', "captions that are no list of texts", "json"),
    text_case("captions that are a number", b'{"captions": 3}', "captions that are no list of texts", "json"),
    text_case("class of null", b'{"cls": null}', "class of null", "json"),
    Case("missing caption", tar_of(("9.png", good())), 3, {"no caption": 1}),
    Case("missing image", tar_of(("9.txt", b"x")), 3, {"no image": 1}),
    Case("duplicate keys", tar_of(*pair(0)), 3, {"tar member of a name that was there before": 2}),
    Case("path traversal", tar_of(("../../9.png", good()), ("../../9.txt", b"x"), ("/9.png", good())), 3,
         {"tar member with a path out of the tar": 3}),
    Case("names that are not UTF-8", tar_of(*pair(9), ("\udcff.png", good(3)), ("\udcff.txt", b"x")), 5),
    Case("name that commands a terminal", tar_of(("\x1b[2J.png", good())), 3, {"no caption": 1}),
    Case("links and devices", tar_of(special("9.png", tarfile.SYMTYPE), special("8.png", tarfile.LNKTYPE),
                                     special("7.png", tarfile.CHRTYPE)), 3, {"tar member that is no plain file": 3}),
    Case("tar cut in a member", damaged(lambda data: data[: data.index(b"004.txt") + 515]), 4,
         {"tar member cut short": 1, "tar without its end": 1, "no caption": 1}),
    Case("tar cut between members", damaged(lambda data: data[: data.index(b"004.png")]), 4,
         {"tar without its end": 1}),
    Case("flipped bit in a header", damaged(flip_header), 5, {"damaged part of a tar": 1, "no image": 1}),
    Case("garbage in a tar", damaged(garbage), 4, {"damaged part of a tar": 1}),
    Case("hole of zeros in a tar", damaged(hole), 5, {"damaged part of a tar": 1}),
    Case("tar padded with zeros", damaged(lambda data: data[: data.index(b"004.png")] + bytes(30_000)), 4,
         {"damaged part of a tar": 1}),
    Case("two tars joined", joined, 6),
    Case("pax header of 8 GB", damaged(huge_pax), 6, {"damaged part of a tar": 1}),
    Case("empty tar", empty_folder, refused="no usable sample in"),
    Case("folder without tars", lambda folder: f"webdataset:{folder}", refused="holds no .tar"),
    Case("tar of garbage only", damaged(lambda data: bytes(range(1, 200)) * 50), refused="damaged part of a tar"),
    Case("tar of zero bytes", damaged(lambda data: b""), refused="no usable sample in"),
    Case("csv: missing file", csv_of(HEADER + "9.png,x\n"), 3,
         {"image file that cannot be opened (FileNotFoundError)": 1}),
    Case("csv: unreadable file", csv_of(HEADER + "loop.png,x\n", also=no_rights), 3,
         {"image file that cannot be opened (OSError)": 1}),
    Case("csv: device, pipe and folder", csv_of(HEADER + "/dev/zero,x\npipe.png,y\nfolder.png,z\n",
                                                also=special_files), 3, {"image path that is no file": 3}),
    Case("csv: caption not in UTF-8", csv_of(HEADER.encode() + b"9.png,caf\xe9\n"), 3,
         {"caption that is not UTF-8": 1}),
    Case("csv: path not in UTF-8", csv_of(HEADER.encode() + b"\xff.png,x\n", also=odd_name), 4),
    Case("csv: empty cells", csv_of(HEADER + "9.png,\n,words\n\n9.png\n"), 3,
         {"no caption": 1, "no image": 1, "row with too few columns": 1}),
    Case("csv: a row that is none", csv_of(HEADER + '9.png,"a "dog"\n'), 3, {"row that is no csv": 1}),
    Case("csv: a quote never closed", csv_of(HEADER + '9.png,"a dog\n' + "0.png,more\n" * 9), refused="line 5"),
    Case("csv: other columns", csv_of("image,caption\n0.png,x\n"), refused="--image-column"),
    Case("csv: header only", csv_of("filepath,title\n"), refused="no usable sample in"),
    Case("csv: empty", csv_of(""), refused="has no column 'filepath' but nothing"),
    Case("folder: one class", folder_of(cat=3), 3, refused="have the same caption or class"),
    Case("fewer pairs than a batch", tar_of(pairs=1), 1, refused="--batch-size 2 is more than the 1 samples"),
    Case("folder: more classes than samples", folder_of(a=0, b=1, c=1, d=0, e=0), usable=2),
    Case("folder: no class", folder_of(), refused="holds no folder"),
    Case("emoji: labels of null", emoji_with_null, 2,
         {"label of null or that is no text": 1, "caption that is no text": 1, "family of null or that is no text": 1}),
]  # fmt: skip


@dataclass
class Found:
    usable: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    refused: str = ""


def run(case: Case, folder: Path) -> Found:
    """Builds the case's files in `folder`, reads everything, and makes batches of two."""
    spec = case.build(folder)
    options = DataOptions(data=spec, workers=0, unseen_fraction=0.0 if spec.startswith("emoji") else 0.1)
    found = Found()
    try:
        dataset = open_dataset(options)
        found.usable = sum(len(batch["index"]) for batch in in_order(dataset, options, batch_size=2, transform=size))
        found.skipped = dict(dataset.skipped.counts)
        for batch in islice(Batches(dataset, options, batch_size=2, seed=0, transform=size).start(0), 3):
            assert len(batch["image"]) == 2
    except UsageError as error:
        found.refused = str(error)
    return found


def as_expected(case: Case, found: Found) -> bool:
    refusal = case.refused in found.refused if case.refused else not found.refused
    return refusal and (found.usable, found.skipped) == (case.usable, case.skipped)


def main() -> None:
    failures = 0
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
            os.environ["XDG_CACHE_HOME"] = cache
            found = run(case, Path(folder))
            told = found.refused.replace(folder, "DIR").splitlines()[0] if found.refused else ""
            told = told or ", ".join(f"{count} {reason}" for reason, count in found.skipped.items())
        right = as_expected(case, found)
        failures += not right
        outcome = "refused" if found.refused else f"{found.usable} read"
        print(f"{'' if right else 'WRONG '}{case.name:34}{outcome:>9}  {told}")
    print(f"{len(CASES)} cases, {failures} wrong")
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
