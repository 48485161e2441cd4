"""`python bench/ curve`: the forward of clip_loss against N, where the N x N logits stop fitting long before it does.

Every point is a process of its own that warms up on a small problem and then runs the op once with its peak of memory
recorded, and again while there is time; the vendor's GEMM (a panel of the logits, floor.py) is timed around each run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import devices, floor, machine, measure, processes
from bench.cases import LARGEST, Case, Passes
from bench.experiments.frame import Outcome
from bench.peers import IMPLEMENTATIONS, gigabytes

SIZES = tuple(2**k for k in range(12, LARGEST.bit_length()))  # 4096 ... 131072
QUICK_SIZES = SIZES[:3]
DTYPES = ("float32", "bfloat16")
WIDTH = 512
BUDGET = 6.0  # seconds of repetitions per point, after the first run
CLIFF = 0.75  # a rate below this share of the best at smaller N is called a cliff
HEADER = (
    f"{'N':>8} {'dtype':<9}{'time':>10}{'memory':>10}{'GF/s':>8}{'vendor':>8}{'floor':>8}"
    f"{'one N x N logits':>18}{'open_clip needs':>17}"
)


@dataclass(frozen=True)
class Point:
    """The best of `runs` runs at one N; rates in flop/s of one pass."""

    n: int
    dtype: str
    seconds: float
    extra_bytes: int
    gemm_rate: float
    runs: int

    @property
    def rate(self) -> float:
        return 2.0 * self.n**2 * WIDTH / self.seconds

    @property
    def floor_percent(self) -> float:
        return 100 * floor.floor_seconds(Passes(1, 0), self.n, self.n, WIDTH, (self.gemm_rate,)) / self.seconds


def case_of(n: int, dtype: str) -> Case:
    return Case("clip_loss", n, WIDTH, dtype, backward=False)


def logits_bytes(n: int, dtype: str) -> float:
    """One (n, n) matrix of the features' dtype."""
    return float(n) ** 2 * {"float32": 4, "bfloat16": 2}[dtype]


def point_child(case: Case, budget: float) -> Point:
    """Measures one point; runs in a process of its own."""
    devices.map_large_allocations()
    loss, inputs = measure.prepare(case, "fused"), measure.make_inputs(case)
    unit = floor.vendor(case)
    seconds: list[float] = []
    rates: list[float] = []

    def once() -> object:
        began = time.perf_counter()
        value = measure.run(loss, inputs, case.backward)
        seconds.append(time.perf_counter() - began)
        return value

    def gauge() -> None:
        rates.extend(unit.rates()[0] for _ in range(3))

    gauge()
    extra = devices.peak_extra_bytes(once)
    gauge()
    while sum(seconds[1:]) + seconds[0] < budget and len(seconds) < measure.ROUNDS:
        once()
        gauge()
    return Point(case.n, case.dtype, min(seconds), extra, max(rates), len(seconds))


def line(point: Point) -> str:
    eager = IMPLEMENTATIONS["clip_loss", "open_clip"].peak_bytes(case_of(point.n, point.dtype))
    return (
        f"{point.n:>8} {point.dtype:<9}{point.seconds:>8.3g} s{gigabytes(point.extra_bytes):>10}"
        f"{point.rate / 1e9:>8.0f}{point.gemm_rate / 1e9:>8.0f}{point.floor_percent:>6.0f} %"
        f"{gigabytes(logits_bytes(point.n, point.dtype)):>18}{gigabytes(eager):>17}"
    )


def cliffs(points: Sequence[Point]) -> list[str]:
    """Where percent of the floor falls below CLIFF of the best at a smaller N of the same dtype."""
    found = []
    for dtype in DTYPES:
        best = 0.0
        for point in sorted((p for p in points if p.dtype == dtype), key=lambda p: p.n):
            if point.floor_percent < CLIFF * best:
                found.append(f"N = {point.n} {dtype}: {point.floor_percent:.0f} % of the floor, {best:.0f} % before")
            best = max(best, point.floor_percent)
    return found


def plot(path: Path, about: dict[str, str | float], points: Sequence[Point]) -> None:
    """Time, memory and percent of the floor against N."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    times, memory, percent = figure.subplots(1, 3)
    for dtype, color in zip(DTYPES, ("C0", "C1"), strict=True):
        own = sorted((p for p in points if p.dtype == dtype), key=lambda p: p.n)
        sizes = [p.n for p in own]
        times.plot(sizes, [p.seconds for p in own], "o-", color=color, label=dtype)
        memory.plot(sizes, [max(p.extra_bytes, 1e5) / 1e9 for p in own], "o-", color=color, label=f"clip_loss, {dtype}")
        logits = [logits_bytes(n, dtype) / 1e9 for n in sizes]
        memory.plot(sizes, logits, ":", color=color, label=f"N x N logits, {dtype}")
        percent.plot(sizes, [p.floor_percent for p in own], "o-", color=color, label=dtype)
    memory.axhline(float(about["memory_gb"]), color="black", linewidth=1, linestyle="--", label="this machine")
    for axis, label in ((times, "seconds"), (memory, "extra peak memory, GB"), (percent, "percent of one vendor GEMM")):
        axis.set(xscale="log", xlabel="N", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in (times, memory):
        axis.set_yscale("log")
    percent.set_ylim(bottom=0)
    figure.suptitle(f"clip_loss forward, D = {WIDTH}: {about['cpu']}, {about['threads']} threads, {about['date']}")
    figure.savefig(path, dpi=110)


def run(quick: bool = False) -> Outcome:
    """The table, printed as it is measured; then the cliffs, of which nothing is demanded."""
    about = machine.describe()
    print("\n".join(f"{key:>13}: {value}" for key, value in about.items()))
    print(f"\nclip_loss forward, D = {WIDTH}; floor: one pass at the vendor GEMM's rate\n{HEADER}", flush=True)
    points = []
    for dtype in DTYPES:
        for n in QUICK_SIZES if quick else SIZES:
            points.append(processes.call(point_child, case_of(n, dtype), BUDGET))
            print(line(points[-1]), flush=True)
    found = [f"cliff: {text}" for text in cliffs(points)] or [f"no cliff: nowhere below {CLIFF:g} of the best"]
    numbers = {"machine": about, "points": [asdict(p) for p in points]}
    return Outcome("\n".join(found), numbers, plot=lambda path: plot(path, about, points))
