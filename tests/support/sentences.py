"""Sentences of a Markdown page: prose and items of lists; not code, tables, titles or pictures."""

from __future__ import annotations

import re


def sentences(text: str) -> list[str]:
    text = re.sub(r"^```.*?^```$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    kept, paragraphs = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text), []
    for paragraph in re.split(r"\n\s*\n|\n(?=- )", kept):
        if not re.match(r"( {4}|#|\||<!--)", paragraph.strip("\n")):
            paragraphs.append(" ".join(paragraph.split()))
    return [s for p in paragraphs for s in re.split(r"(?<=[.!?])\**\s+(?=[A-Z`*\[\"])", p) if s]


def words(sentence: str) -> int:
    return len(re.findall(r"[^\s*`]*\w[^\s*`]*", re.sub(r"`[^`]*`", "code", sentence)))
