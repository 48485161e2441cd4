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


@pytest.mark.parametrize(
    "name",
    [name for name in ck.__all__ if name not in ("nn", "distributed") and (ROOT / "docs" / f"{name}.md").exists()],
)
def test_a_function_has_signature_mathematics_memory_and_an_output(site: Path, name: str) -> None:
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / f"{name}.html").read_text()))
    assert f"{name}(" in page and "In the code" in page
    for part in ("Definition", "Example"):
        assert re.search(rf"^\s*{part}", page, re.MULTILINE), f"{name} has no section {part}"
    assert re.search(r"O\(n|memory|Memory", page)
