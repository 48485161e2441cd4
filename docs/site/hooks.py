"""What the site adds to the pages, which are written to be read in the repository as well.

links to files outside docs/     lead to copies under source/; links to folders become plain words
pages of functions               end with the signature and docstring of each name in their title
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[((?:[^\]\n]|\n(?!\n))+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
TITLE = re.compile(r"^# (\w+(?:, \w+)*)\n")
MODULES = {"nn": ["cibr_kernels.nn"], "distributed": ["cibr_kernels.distributed"]}


def on_files(files: Files, config: Any) -> Files:
    """Adds the files outside docs/ that a page links to, pictures aside as text."""
    docs = Path(config.docs_dir)
    for page in list(files.documentation_pages()):
        for _, target, _ in LINK.findall(page.content_string):
            outside = _outside(docs / page.src_uri, target, docs)
            if outside and outside.is_file() and (uri := _copy(outside)) not in files.src_uris:
                files.append(File.generated(config, uri, content=outside.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Rewrites what leaves docs/, and appends what the code says of a page's functions."""
    docs = Path(config.docs_dir)

    def relink(match: re.Match[str]) -> str:
        words, target, _ = match.groups()
        outside = _outside(docs / page.file.src_uri, target, docs)
        if outside is None:  # pages are no longer files here
            return match[0].replace(f"[{words}]", f"[{words.removesuffix('.md')}]", 1)
        return f"[{words}]({'../' * page.file.src_uri.count('/')}{_copy(outside)})" if outside.is_file() else words

    markdown = LINK.sub(relink, markdown)
    names = _functions(page.file.src_uri, markdown)
    options = "    options: {heading_level: 3}\n"
    said = [f"::: {name}\n{options}" for name in names]
    return "\n\n".join([markdown, "## In the code", *said]) if said else markdown


def _functions(uri: str, markdown: str) -> list[str]:
    """The public names that a page is about: those in its title, or all of a subpackage."""
    stem = uri.removesuffix(".md")
    if stem in MODULES:
        return MODULES[stem]
    title = TITLE.match(markdown)
    public = (ROOT / "cibr_kernels" / "__init__.py").read_text()
    return [f"cibr_kernels.{name}" for name in title[1].split(", ") if f'"{name}"' in public] if title else []


def _outside(page: Path, target: str, docs: Path) -> Path | None:
    """The file or folder of the repository that a link means, if it lies outside docs/."""
    if "://" in target or target.startswith("mailto:"):
        return None
    path = (page.parent / target).resolve()
    return None if path.is_relative_to(docs.resolve()) or not path.exists() else path


def _copy(path: Path) -> str:
    """Where the site keeps a file of the repository: text under .txt, for a browser to show."""
    uri = "source/" + path.relative_to(ROOT).as_posix()
    return uri if path.suffix in (".png", ".txt") else uri + ".txt"
