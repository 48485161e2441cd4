"""comparison.png: each method's paired difference to what it is compared with, a panel a metric."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cibr.plots import COLOURS, figure


def opened(paths: Sequence[Path]) -> tuple[list[Path], list[dict[str, Any]]]:
    """Folders of runs, and in place of a comparison's folder its runs' -> the runs', and the comparisons' numbers."""
    runs: list[Path] = []
    found = []
    for path in paths:
        if (path / "compare.json").is_file():
            found.append(json.loads((path / "compare.json").read_text()))
            runs += sorted(result.parent for result in path.glob("*/*/result.json"))
        else:
            runs.append(path)
    return runs, found


def draw_comparison(found: dict[str, Any], path: Path) -> None:
    """A dot is the mean, a thick line one standard error, a thin one two; filled where Holm's p is below .05."""
    rows = [row for row in found["rows"] if "difference" in row and row["point"] == "best"]
    metrics = [metric for metric in found["metrics"] if any(row["metric"] == metric for row in rows)]
    names = list(dict.fromkeys(row["configuration"] for row in rows))
    across = min(3, len(metrics))
    down = -(-len(metrics) // across)
    height = 0.9 + 0.32 * len(names)
    with figure(path, across, rows=down, width=4.2, height=height, legend=False) as axes:
        for axis in axes.flat[len(metrics) :]:
            axis.remove()
        for axis, metric in zip(axes.flat, metrics, strict=False):
            axis.axvline(0, color="0.6", linewidth=1)
            for place, name in enumerate(names):
                row = next((r for r in rows if r["metric"] == metric and r["configuration"] == name), None)
                if row is None:
                    continue
                mean, se = row["difference"], row["difference_se"]
                for width, errors in ((2.4, 1), (0.9, 2)):
                    axis.plot([mean - errors * se, mean + errors * se], [place] * 2, color=COLOURS[0], linewidth=width)
                sure = row.get("p_holm", 1) < 0.05
                face = COLOURS[1] if sure else "white"
                axis.plot(mean, place, marker="o", markersize=6, color=COLOURS[0], markerfacecolor=face)
            axis.set_yticks(range(len(names)), [label(found, rows, name) for name in names], fontsize=8)
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.set(xlabel="percentage points")
            axis.set_title(metric + (" (primary)" if metric == found["metrics"][0] else ""), fontsize=9)


def label(found: dict[str, Any], rows: list[dict[str, Any]], name: str) -> str:
    """With what it is compared with."""
    against = next(row["against"] for row in rows if row["configuration"] == name)
    return f"{name} − {against}"
