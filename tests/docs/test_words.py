"""Every page that somebody reads to use or change this has short sentences with about one number each.

docs/notes/ is the lab book and is left out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from sentences import numbers, sentences, words

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "DESIGN.md", "CONTRIBUTING.md")),
    *sorted(page for page in DOCS.rglob("*.md") if DOCS / "notes" not in page.parents),
]
AS_COMMITTED = {"evidence_protocol"}  # written before the runs that it rules: its words are not touched
PAGES = [page for page in PAGES if page.stem not in AS_COMMITTED]
WORDS, NUMBERS, NUMBERS_ON_AVERAGE = 25, 3, 1.0
WITHOUT_SENTENCES = {"glossary"}  # a table


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short_and_have_about_one_number(page: Path) -> None:
    found = sentences(page.read_text())
    assert len(found) >= 4 or page.stem in WITHOUT_SENTENCES
    assert [s for s in found if words(s) > WORDS] == []
    assert [s for s in found if numbers(s) > NUMBERS] == []
    assert sum(map(numbers, found)) <= NUMBERS_ON_AVERAGE * len(found)


def test_what_counts_as_a_sentence() -> None:
    text = "# T\nOne **two.** Three `a b` [four](x.md),\nfive.\n\n    code\n\n1. Six. Seven\n- Eight\n| a | b |\n"
    assert sentences(text) == ["One **two.", "Three `a b` four, five.", "Six.", "Seven", "Eight"]
    assert [words(s) for s in sentences(text)] == [2, 4, 1, 1, 1]
    fenced = "Before:\n\n```python\na = 1. B\n```\n<!-- needs: x -->\n![A picture](a.png)\n"
    assert sentences(fenced) == ["Before:", "A picture"]


def test_what_counts_as_a_number() -> None:
    sentence = (
        "On an H200, R@1 of CIFAR-100 by `f(3)` is -2.1 (.4) of 1,024, 1e-3 x 2.5 on 27 November 2026 (2503.24182)."
    )
    assert numbers(sentence) == 4
