"""`mkdocs build --strict`: no broken link or anchor, and what the site adds to the pages is there."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cibr_kernels as ck

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("mkdocs", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("mkdocs is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there_and_so_is_what_it_links_to(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert all((site / page).exists() for page in pages)
    for page in pages:
        for target in re.findall(r'href="([^"#:]+)(?:#[^"]*)?"', (site / page).read_text()):
            assert ((site / page).parent / target).exists(), f"{page} links to {target}"


FUNCTIONS = [
    name for name in ck.__all__ if name not in ("nn", "distributed") and (ROOT / "docs" / f"{name}.md").exists()
]
SHOWN = {
    **{name: [name] for name in FUNCTIONS},
    "negatives": ["Negatives", "SoftTargets"],
    "nn": ck.nn.__all__,
    "distributed": [name for name in ck.distributed.__all__ if name != "Traffic"],  # nobody makes one
}


def words(site: Path, page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", (site / f"{page}.html").read_text()))


@pytest.mark.parametrize("page", SHOWN)
def test_a_page_has_signatures_mathematics_memory_and_an_output(site: Path, page: str) -> None:
    """The signatures by hand and, with the docstrings, by mkdocstrings."""
    text, source = words(site, page), (ROOT / "docs" / f"{page}.md").read_text()
    by_hand, _, in_the_code = text.rpartition("In the code")
    for name in SHOWN[page]:
        assert re.search(rf"^\s*{name}\(", by_hand, re.MULTILINE), f"{page} shows no signature of {name}"
        assert name in in_the_code, f"{page} ends without what the code says of {name}"
    assert re.search(r"^\s*Example", by_hand, re.MULTILINE) and re.search(r"^```\n```text\n", source, re.MULTILINE)
    definition = r"^\s*Definition" if page != "nn" else r"T\(x, z\) ="  # each module's in its own section
    assert re.search(definition, by_hand, re.MULTILINE), f"{page} has no mathematics"
    assert re.search(r"O\(n|O\(total|memory|Memory", by_hand), f"{page} says nothing of memory"
