"""What a page shows of a script's output against what it prints: the same words, and numbers that are near."""

from __future__ import annotations

import re

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def assert_printed(lines: str, printed: str, tolerance: float) -> None:
    """Each of `lines` is somewhere in `printed`, its words in their order and each number to `tolerance`, relative.

    Numbers differ between processors: a sum in another order, and what training makes of it.
    """
    for line in lines.splitlines():
        pattern = f"({NUMBER.pattern})".join(re.escape(words) for words in NUMBER.split(line))
        expected = [float(number) for number in NUMBER.findall(line)]
        found = [[float(n) for n in match.groups()] for match in re.finditer(pattern, printed)]
        near = [
            all(abs(a - b) <= tolerance * abs(b) + 1e-6 for a, b in zip(numbers, expected, strict=True))
            for numbers in found
        ]
        assert any(near), f"the page shows\n    {line}\nbut the script prints\n{printed[-3000:]}"
