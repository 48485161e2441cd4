"""The README's Python runs as it stands, and the page stays one that a stranger can read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sentences import sentences, words

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_snippet_takes_a_training_step():
    names: dict[str, Any] = {}
    exec("".join(BLOCKS), names)
    assert names["loss"].isfinite()
    parameters = [*names["towers"].parameters(), *names["loss_fn"].parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)


def test_it_takes_about_a_hundred_lines_of_short_sentences():
    assert README.count("\n") <= 110
    found = sentences(README)
    assert len(found) > 30 and [s for s in found if words(s) > 25] == []


def test_what_counts_as_a_sentence():
    text = "# T\n\nOne **two.** Three `a b` [four](x.md),\nfive.\n\n    code\n\n- Six. Seven\n- Eight\n\n| a | b |\n"
    assert sentences(text) == ["One **two.", "Three `a b` four, five.", "- Six.", "Seven", "- Eight"]
    assert [words(s) for s in sentences(text)] == [2, 4, 1, 1, 1]
