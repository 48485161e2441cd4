"""The README's Python runs as it stands, and the page stays short (test_words.py holds its sentences)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_snippet_takes_a_training_step():
    names: dict[str, Any] = {}
    exec("".join(BLOCKS), names)
    assert names["loss"].isfinite()
    parameters = [*names["towers"].parameters(), *names["loss_fn"].parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)


def test_it_takes_about_a_hundred_lines() -> None:
    assert README.count("\n") <= 110
