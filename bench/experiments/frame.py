"""What is around every experiment: seeds, a table, and the files that were asked for, each written as a whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import report

SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)


@dataclass(frozen=True)
class Outcome:
    """What an experiment found: the text to print, the numbers, whether all demands are met, and how to draw it."""

    text: str
    numbers: dict[str, Any]
    met: bool = True
    plot: Callable[[Path], None] | None = None


def seeds(quick: bool) -> tuple[int, ...]:
    return QUICK_SEEDS if quick else SEEDS


def conduct(experiment: Callable[[bool], Outcome], quick: bool, file: Path | None, picture: Path | None) -> int:
    """Runs, prints and writes -> 0; 1 where a demand is missed; 2, before any work, where nothing could draw."""
    if picture is not None:
        try:
            report.require_matplotlib()
        except ModuleNotFoundError as error:
            print(error, file=sys.stderr)
            return 2
    outcome = experiment(quick)
    print(outcome.text)
    if file is not None:
        report.write(file, outcome.numbers)
    if picture is not None and outcome.plot is not None:
        with report.whole(picture) as partial:
            outcome.plot(partial)
    return 0 if outcome.met else 1
