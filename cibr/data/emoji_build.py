"""The multi-vendor emoji set: one concept drawn by up to eleven artists, as webdataset tars.

A concept is an emoji without its skin tones, keyed by its code points less the variation selector (`1f600`, `2764`).
A style is one vendor's drawings, a family all styles of a vendor. The set comes from fixed versions of npm packages:

    DIR/<style>.tar       <concept>_<style>.png, RGB on white, and .json: concept, style, family, label, keywords, group
    DIR/attribution.csv   package, version, author, licence and number of images per style, and the texts' sources
    DIR/set.json          what was built; its presence says that the set is whole

Some packages name their drawings by code point; the others join by name: the slug of the concept's label, or any name
the first give it. A name that two concepts share joins neither, and one drawing serves one concept.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cibr.errors import UsageError, missing_extra
from cibr.run.atomic import atomic_directory


@dataclass(frozen=True)
class Style:
    name: str
    family: str
    package: str
    version: str
    join: str  # "code": chars.json maps code points to icons; "name": by name; "file": one image file per code point
    names: bool = False  # its icon names and aliases join the styles that have names only


STYLES = (
    Style("noto", "google", "@iconify-json/noto", "1.2.9", "code", names=True),
    Style("noto-v1", "google", "@iconify-json/noto-v1", "1.2.5", "name"),
    Style("twemoji", "twemoji", "@iconify-json/twemoji", "1.2.5", "code", names=True),
    Style("openmoji", "openmoji", "@iconify-json/openmoji", "1.2.29", "code", names=True),
    Style("fluent-3d", "microsoft", "@lobehub/fluent-emoji-3d", "1.1.0", "file"),
    Style("fluent-flat", "microsoft", "@iconify-json/fluent-emoji-flat", "1.2.6", "code", names=True),
    Style("fluent-high-contrast", "microsoft", "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "code"),
    Style("emojione", "emojione", "@iconify-json/emojione", "1.2.3", "name"),
    Style("emojione-v1", "emojione", "@iconify-json/emojione-v1", "1.2.3", "name"),
    Style("emojione-monotone", "emojione", "@iconify-json/emojione-monotone", "1.2.1", "name"),
    Style("fxemoji", "mozilla", "@iconify-json/fxemoji", "1.2.2", "name"),
)
TEXTS = {"emojibase-data": "17.0.0", "emojilib": "4.0.3"}
FLUENT_3D = {  # its package carries no info.json
    "title": "Fluent Emoji 3D",
    "author": "Microsoft Corporation",
    "licence": "MIT",
    "source": "https://github.com/microsoft/fluentui-emoji",
}


@dataclass(frozen=True)
class Concept:
    key: str
    label: str
    keywords: tuple[str, ...]
    group: str


class Package:
    """Read access to one npm tarball."""

    def __init__(self, tarballs: Path, name: str, version: str) -> None:
        path = tarballs / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"  # npm pack's own naming
        if not path.is_file():
            raise UsageError(f"{path.name} is not in {tarballs}; it comes from: npm pack {name}@{version}")
        with tarfile.open(path) as tar:
            members = (m for m in tar if m.isfile() and m.name.endswith((".json", ".webp")))
            self.files = {m.name.removeprefix("package/"): tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]

    def json(self, name: str) -> Any:
        return json.loads(self.files[name])


def download(packages: Mapping[str, str], directory: Path) -> None:
    """Fetches `{package: version}` as tarballs into `directory` with `npm pack`; no install script runs."""
    npm = shutil.which("npm")
    if npm is None:
        raise UsageError(
            "npm was not found, and the emoji come as npm packages: install Node.js (which brings npm), "
            "or run `npm pack` for them elsewhere and pass the folder of .tgz files as --tarballs"
        )
    specs = [f"{name}@{version}" for name, version in packages.items()]
    command = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(directory), *specs]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UsageError(
            f"`npm pack` failed with status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        )


def concept_key(code_points: str) -> str:
    """`"00A9-FE0F"` -> `"a9"`: lower case, no variation selector, no leading zeros."""
    return "-".join(p.lower().lstrip("0") for p in code_points.split("-") if p.lower() != "fe0f")


def slug(name: str) -> str:
    """`"flag: Côte d'Ivoire"` -> `"flag-cote-d-ivoire"`."""
    ascii_name = unicodedata.normalize("NFKD", name.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-")


def read_concepts(emojibase: Package, emojilib: Package) -> dict[str, Concept]:
    """All emoji but components (bare skin tones, hair); skin-tone variants are not entries of their own there."""
    groups = emojibase.json("meta/groups.json")["groups"]
    more_keywords = {
        "-".join(f"{ord(c):x}" for c in emoji): words for emoji, words in emojilib.json("dist/emoji-en-US.json").items()
    }
    more_keywords = {concept_key(code_points): words for code_points, words in more_keywords.items()}
    concepts = {}
    for entry in emojibase.json("en/data.json"):
        group = groups.get(str(entry.get("group")), "component")
        if group == "component":
            continue
        key = concept_key(entry["hexcode"])
        words = [*entry.get("tags", ()), *(w.replace("_", " ") for w in more_keywords.get(key, ()))]
        keywords = tuple(w for w in dict.fromkeys(w.lower() for w in words) if w != entry["label"].lower())
        concepts[key] = Concept(key, entry["label"], keywords, group)
    return concepts


def join_by_code(concepts: Iterable[str], chars: Mapping[str, str], icons: Mapping[str, Any]) -> dict[str, str]:
    """`{concept: icon}` from a package's own table of code points."""
    by_key: dict[str, str] = {}
    for code_points, icon in chars.items():
        if icon in icons["icons"] or icon in icons.get("aliases", {}):
            by_key.setdefault(concept_key(code_points), icon)
    return {key: by_key[key] for key in concepts if key in by_key}


def concept_names(
    concepts: Mapping[str, Concept], coded: Iterable[tuple[dict[str, str], Mapping[str, Any]]]
) -> dict[str, list[str]]:
    """`{concept: names}`, label first, then the names and aliases that `(join_by_code(...), icons)` pairs give it.

    A name that two concepts bear is left to the one whose label it is, and to neither if it is no label or both's.
    """
    label_of = {key: slug(concept.label) for key, concept in concepts.items()}
    bearers: dict[str, set[str]] = defaultdict(set)
    for joined, icons in coded:
        plain_aliases = defaultdict(list)
        for alias, target in icons.get("aliases", {}).items():
            if set(target) == {"parent"}:  # the same drawing, neither flipped nor turned
                plain_aliases[target["parent"]].append(alias)
        for key, icon in joined.items():
            for name in (icon, *plain_aliases[icon]):
                bearers[name].add(key)
    labels: dict[str, set[str]] = defaultdict(set)
    for key, label in label_of.items():
        labels[label].add(key)
    names: dict[str, list[str]] = {key: [] for key in concepts}
    for name, keys in {**bearers, **labels}.items():  # a label outweighs what others call it
        if len(keys) == 1:
            names[next(iter(keys))].append(name)
    return {key: sorted(own, key=lambda name: (name != label_of[key], name)) for key, own in names.items()}


def join_by_name(names: Mapping[str, list[str]], icons: Mapping[str, Any]) -> dict[str, str]:
    """`{concept: icon}`: the first of a concept's names that the package knows, dashes aside.

    One drawing serves one concept: the one that bears the drawing's own name, not an alias of it, before others.
    """
    aliases = icons.get("aliases", {})
    known = {name.replace("-", ""): name for name in (*aliases, *icons["icons"])}
    claims: dict[str, list[tuple[bool, str, str]]] = defaultdict(list)
    for key, own in names.items():
        icon = next((known[n.replace("-", "")] for n in own if n.replace("-", "") in known), None)
        if icon is not None:
            drawing = icon
            while drawing in aliases:
                drawing = aliases[drawing]["parent"]
            claims[drawing].append((icon != drawing, key, icon))
    winners = {key: icon for _, key, icon in (min(claimants) for claimants in claims.values())}
    return {key: winners[key] for key in names if key in winners}


def icon_svg(icons: Mapping[str, Any], name: str) -> str:
    """The drawing as an SVG document; an alias may mirror its parent."""
    flips = {"hFlip": False, "vFlip": False}
    while name in icons.get("aliases", {}):
        alias = icons["aliases"][name]
        if unknown := set(alias) - {"parent", *flips}:
            raise ValueError(f"alias {name!r} has {sorted(unknown)}, which this reader does not draw")
        flips = {flip: flips[flip] ^ bool(alias.get(flip)) for flip in flips}
        name = alias["parent"]
    icon = icons["icons"][name]
    left, top = (icon.get(side, icons.get(side, 0)) for side in ("left", "top"))
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    body = icon["body"].replace("currentColor", "#000")
    if flips["hFlip"]:
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    if flips["vFlip"]:
        body = f'<g transform="translate(0 {2 * top + height}) scale(1 -1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


def _renderer(size: int) -> Callable[[str | bytes], bytes]:
    """A function from an SVG document or an image file's bytes to a `size` x `size` PNG, RGB on white."""
    try:
        from PIL import Image
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise missing_extra(error) from error

    def render(drawing: str | bytes) -> bytes:
        if isinstance(drawing, str):
            width, height = map(float, re.findall(r'(?:width|height)="([\d.]+)"', drawing)[:2])
            side: dict[str, Any] = {"width": size} if width >= height else {"height": size}
            drawing = svg_to_bytes(svg_string=drawing, skip_system_fonts=True, **side)
        image = Image.open(io.BytesIO(drawing)).convert("RGBA")
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        page = Image.new("RGBA", (size, size), "white")
        page.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
        png = io.BytesIO()
        page.convert("RGB").save(png, "PNG")
        return png.getvalue()

    return render


def _drawings(
    style: Style, package: Package, concepts: Mapping[str, Concept], names: Mapping[str, list[str]]
) -> dict[str, str | bytes]:
    if style.join == "file":
        files = {concept_key(Path(file).stem): data for file, data in package.files.items() if file.endswith(".webp")}
        return {key: files[key] for key in concepts if key in files}
    icons = package.json("icons.json")
    joined = (
        join_by_code(concepts, package.json("chars.json"), icons)
        if style.join == "code"
        else join_by_name(names, icons)
    )
    return {key: icon_svg(icons, icon) for key, icon in joined.items()}


def _credit(package: Package) -> dict[str, str]:
    if "info.json" not in package.files:
        return FLUENT_3D
    info = package.json("info.json")
    author, licence = info["author"], info["license"]
    return {
        "title": info["name"],
        "author": author["name"],
        "licence": licence["spdx"],
        "source": author.get("url") or licence["url"],
    }


def build(
    out: Path, *, tarballs: Path | None = None, size: int = 64, styles: tuple[Style, ...] = STYLES
) -> dict[str, Any]:
    """Builds the set at `out` and returns what stands in its set.json, with `built` False if it was there already.

    `tarballs` is a folder that holds the npm packages already; without it they are downloaded. `out` must not exist, or
    be empty, or hold this very set. Raises UsageError for a missing npm, package or dependency and an `out` in use.
    """
    packages = {**{style.package: style.version for style in styles}, **TEXTS}
    asked = {"format": 1, "size": size, "packages": packages}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = json.loads((out / "set.json").read_text()) if (out / "set.json").is_file() else {}
        if {key: found.get(key) for key in asked} == asked:
            return {**found, "built": False}
        raise UsageError(
            f"{out} holds {'another emoji set' if found else 'something else'}; remove it or choose another --out"
        )
    render = _renderer(size)
    try:
        from tqdm import tqdm
        from webdataset import TarWriter
    except ImportError as error:
        raise missing_extra(error) from error

    with tempfile.TemporaryDirectory() as scratch:
        if tarballs is None:
            tarballs = Path(scratch)
            download(packages, tarballs)
        concepts = read_concepts(*(Package(tarballs, name, version) for name, version in TEXTS.items()))
        sources = {style: Package(tarballs, style.package, style.version) for style in styles}
    coded = [(source.json("chars.json"), source.json("icons.json")) for style, source in sources.items() if style.names]
    names = concept_names(concepts, [(join_by_code(concepts, chars, icons), icons) for chars, icons in coded])

    counts = {}
    with atomic_directory(out) as work:
        for style, source in sources.items():
            drawings = _drawings(style, source, concepts, names)
            counts[style.name] = len(drawings)
            with TarWriter(str(work / f"{style.name}.tar"), encoder=False, mtime=0) as tar:
                for key, drawing in tqdm(drawings.items(), desc=style.name, unit="image", disable=None):
                    concept = concepts[key]
                    text = {"label": concept.label, "keywords": concept.keywords, "group": concept.group}
                    about = {"concept": key, "style": style.name, "family": style.family, **text}
                    tar.write(
                        {"__key__": f"{key}_{style.name}", "png": render(drawing), "json": json.dumps(about).encode()}
                    )
        with (work / "attribution.csv").open("w", newline="") as file:
            columns = ["style", "family", "images", "package", "version", "title", "author", "licence", "source"]
            table = csv.DictWriter(file, columns, restval="")
            table.writeheader()
            for style, source in sources.items():
                row = {"style": style.name, "family": style.family, "images": counts[style.name]}
                table.writerow({**row, "package": style.package, "version": style.version, **_credit(source)})
            for name, version in TEXTS.items():
                table.writerow(
                    {"style": "(labels and keywords)", "package": name, "version": version, "licence": "MIT"}
                )
        report = {**asked, "concepts": len(concepts), "images": sum(counts.values()), "styles": counts}
        (work / "set.json").write_text(json.dumps(report, indent=1))
    return {**report, "built": True}
