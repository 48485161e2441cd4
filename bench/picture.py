"""`python bench/ picture`: memory and time of clip_loss against N, from the record of a GPU, for the README.

A record is the text of one run (bench/results/gpu-h200.txt): blocks that begin with `clip_loss-train-NxD` and have a
line per implementation.  Nothing is measured here, so the picture is the record's and says whose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD, PICTURE = ROOT / "bench/results/gpu-h200.txt", ROOT / "docs/clip_loss.png"
BLOCK = re.compile(r"^clip_loss-train-(\d+)x(\d+)$")
ROW = re.compile(r"^  (\w+) +([\d.e+]+)  [\d.e+]+ \.\. [\d.e+]+ +[\d.]+x +([\d.]+) (B|kB|MB|GB|TB)\b")
UNITS = {"B": 1e-9, "kB": 1e-6, "MB": 1e-3, "GB": 1.0, "TB": 1e3}
LINES = {  # label, marker and line, so that the picture can be read in black and white
    "open_clip": ("open_clip", "s:", "#888888"),
    "compiled": ("torch.compile, one logits matrix", "^--", "#d08020"),
    "fused": ("cibr_kernels", "o-", "#1f5fbf"),
}


@dataclass(frozen=True)
class Point:
    implementation: str
    n: int
    milliseconds: float
    gigabytes: float


def read(record: str, width: int) -> list[Point]:
    """The rows of clip_loss training steps at feature width `width`.  Raises ValueError where there are none."""
    points, n = [], None
    for line in record.splitlines():
        if line and not line.startswith(" "):
            block = BLOCK.match(line)
            n = int(block[1]) if block and int(block[2]) == width else None
        row = ROW.match(line) if n is not None else None
        if n is not None and row and row[1] in LINES:
            points.append(Point(row[1], n, float(row[2]), float(row[3]) * UNITS[row[4]]))
    if not points:
        raise ValueError(f"the record has no training step of clip_loss at width {width}")
    return points


def draw(points: list[Point], title: str, out: Path) -> None:
    """Two panels, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    sizes = sorted({p.n for p in points})
    for axis, value, label in (
        (axes[0], lambda p: p.gigabytes, "peak memory of a step, GB"),
        (axes[1], lambda p: p.milliseconds, "time of a step, ms"),
    ):
        for implementation, (name, style, color) in LINES.items():
            own = sorted((p for p in points if p.implementation == implementation), key=lambda p: p.n)
            axis.plot([p.n for p in own], [value(p) for p in own], style, color=color, label=name)
        axis.set(xscale="log", yscale="log", xlabel="rows of the batch, N", ylabel=label)
        axis.xaxis.set_major_locator(FixedLocator(sizes))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:.0f}k"))
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if axis is axes[0] else (1.0, 2.0, 5.0)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize="small", frameon=False)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(out, dpi=120)


def main(out: Path | None = None, record: Path = RECORD, width: int = 512) -> int:
    """Draws `record` -> 0.  `out`: docs/clip_loss.png by default."""
    text = record.read_text()
    gpu = re.search(r"^ *gpu: (.+)$", text, re.MULTILINE)
    title = (
        f"clip_loss, forward + backward, bfloat16, D = {width}, {gpu[1] if gpu else record.stem}, called from Python"
    )
    draw(read(text, width), title, out or PICTURE)
    return 0
