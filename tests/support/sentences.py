"""Sentences of a Markdown page, each item of a list on its own, with their words and numbers.

Prose only: not code, tables, titles, pictures or the targets of links.
"""

from __future__ import annotations

import re

FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINES = re.compile(r"^(?: {4,}|#+ |\s*\||<!--|:::).*$", re.MULTILINE)  # code, titles, tables, comments, docstrings
ITEM = r"(?:-|\d+\.) "
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
NAMES = re.compile(rf"(?:\d+ )?(?:{MONTHS}) \d{{4}}|\b\d{{4}}\.\d{{5}}\b")  # dates, papers of arXiv
NUMBER = re.compile(
    r"(?<![\w@/.-])[-+.]?\d[\d.,]*(?: \([\d.]+\))?"
)  # with its standard error; not in a name: H200, R@1


def sentences(text: str) -> list[str]:
    prose = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", LINES.sub("\n", FENCED.sub("\n", text)))
    paragraphs = [" ".join(p.split()) for p in re.split(rf"\n\s*\n|\n(?=\s*{ITEM})", prose)]
    bare = [re.sub(rf"^{ITEM}", "", p) for p in paragraphs]
    return [s for p in bare for s in re.split(r"(?<=[.!?])[*)\"]*\s+(?=[A-Z`*(\[\"])", p) if s]


def without_code(sentence: str) -> str:
    return re.sub(r"`[^`]*`", "code", sentence)


def words(sentence: str) -> int:
    return len(re.findall(r"[^\s*`]*\w[^\s*`]*", without_code(sentence)))


def numbers(sentence: str) -> int:
    return len(NUMBER.findall(NAMES.sub("", without_code(sentence))))
