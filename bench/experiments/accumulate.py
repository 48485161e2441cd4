"""`python bench/ accumulate`: memory and time of a batch in parts, against the plain step and against GradCache.

Towers are transformers over random patches and tokens, so that activations, not weights, fill the memory.  Peaks are
each of a process of its own, which warms up on a few rows and runs one step.  Times are processor times as ratios to
the plain step, the ways taking turns in one process.  All ways must have the plain step's gradients.

`gradcache` is a re-implementation of Gao et al. 2021 (2101.06983), section 3.2, with the surrogate of its authors' code
(luyug/GradCache), the dot product of features and cached gradients.  As theirs it encodes one tower at a time, where
`accumulate` has a part of both in memory.  Its loss is open_clip's, on N x N logits.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cibr_kernels as ck
from bench import devices, machine, processes
from bench.experiments.frame import Outcome
from bench.peers import gigabytes

WIDTH, TOKENS, LAYERS = 128, 50, 3
ROWS, QUICK_ROWS = 256, 64
PARTS = (4, 8, 16)
ROUNDS, QUICK_ROUNDS = 3, 1
HEADER = f"{'way':<12}{'parts':>6}{'memory':>10}{'of plain':>10}{'time':>8}{'|gradient|':>14}"
AGREE = 1e-4  # of the gradients' norms, relative to the plain step's: float32 sums in other orders


class Tower(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, TOKENS, inputs) -> (rows, WIDTH), unit norm."""
        return F.normalize(self.project(self.layers(self.embed(x)).mean(1)), dim=1)


@dataclass
class Problem:
    towers: nn.ModuleList
    log_scale: nn.Parameter
    batch: tuple[Tensor, Tensor]  # (rows, TOKENS, inputs) of either side

    def parameters(self) -> list[nn.Parameter]:
        return [*self.towers.parameters(), self.log_scale]

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = (tower(side[rows]) for tower, side in zip(self.towers, self.batch, strict=True))
        return x, y, self.log_scale.exp()


def problem(rows: int) -> Problem:
    torch.manual_seed(0)
    towers = nn.ModuleList([Tower(48), Tower(32)])
    return Problem(
        towers, nn.Parameter(torch.tensor(2.659)), (torch.randn(rows, TOKENS, 48), torch.randn(rows, TOKENS, 32))
    )


def eager_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """open_clip's, on one matrix of logits."""
    logits, labels = scale * x @ y.T, torch.arange(len(x))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


# ---------------------------------------------------------------- the ways of one step; each leaves gradients in .grad
def plain(p: Problem, parts: list[Tensor]) -> None:
    ck.clip_loss(*p.encode(torch.cat(parts))).backward()


def accumulate(p: Problem, parts: list[Tensor]) -> None:
    ck.accumulate(p.encode, parts, ck.clip_loss, model=p.towers)


def gradcache(p: Problem, parts: list[Tensor]) -> None:
    """Features without a graph; the loss's gradients at them; every part of either tower again, by the dot of both."""
    sides = list(zip(p.towers, p.batch, strict=True))
    with torch.no_grad():
        cache = [torch.cat([tower(side[rows]) for rows in parts]) for tower, side in sides]
    x, y = (t.requires_grad_() for t in cache)
    eager_loss(x, y, p.log_scale.exp()).backward()
    for (tower, side), t in zip(sides, (x, y), strict=True):
        assert t.grad is not None
        for rows, cached in zip(parts, t.grad.split([len(r) for r in parts]), strict=True):
            (tower(side[rows]).flatten() @ cached.flatten()).backward()


WAYS: dict[str, Callable[[Problem, list[Tensor]], None]] = {
    "plain": plain,
    "accumulate": accumulate,
    "gradcache": gradcache,
}


@dataclass(frozen=True)
class Way:
    """One way with so many parts: bytes at the peak, processor time over the plain step's, the gradients' norm."""

    name: str
    parts: int
    extra_bytes: int
    seconds_ratio: float
    norm: float


def step(p: Problem, name: str, rows: int, parts: int) -> float:
    """One step from no gradients -> the norm of all of them."""
    for parameter in p.parameters():
        parameter.grad = None
    WAYS[name](p, list(torch.arange(rows).chunk(parts)))
    return float(nn.utils.get_total_norm([q.grad for q in p.parameters() if q.grad is not None]))


def peak_child(name: str, rows: int, parts: int) -> tuple[int, float]:
    """-> extra bytes at the peak of a step, gradients included, and their norm; runs in a process of its own."""
    devices.map_large_allocations()
    p = problem(rows)
    step(p, name, 2 * parts, parts)  # warms up on a few rows
    gc.collect()
    norms: list[float] = []
    return devices.peak_extra_bytes(lambda: norms.append(step(p, name, rows, parts))), norms[0]


def ratios_child(ways: list[tuple[str, int]], rows: int, rounds: int) -> list[float]:
    """Median over rounds of each way's processor time over the plain step's beside it."""
    p = problem(rows)
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for (name, parts), own in zip(ways, seconds, strict=True):
            began = time.process_time()
            step(p, name, rows, parts)
            own.append(time.process_time() - began)
    plain_seconds = seconds[0]
    return [median(a / b for a, b in zip(own, plain_seconds, strict=True)) for own in seconds]


def line(way: Way, first: Way) -> str:
    memory = f"{gigabytes(way.extra_bytes):>10}{way.extra_bytes / first.extra_bytes:>10.2f}"
    return f"{way.name:<12}{way.parts:>6}{memory}{way.seconds_ratio:>8.2f}{way.norm:>14.6f}"


def run(quick: bool = False) -> Outcome:
    """The table; met where every way has the plain step's gradients."""
    about = machine.describe()
    rows = QUICK_ROWS if quick else ROWS
    ways = [("plain", 1), *((name, parts) for parts in PARTS for name in ("accumulate", "gradcache"))]
    ratios = processes.call(ratios_child, ways, rows, QUICK_ROUNDS if quick else ROUNDS)
    found = []
    for (name, parts), ratio in zip(ways, ratios, strict=True):
        extra, norm = processes.call(peak_child, name, rows, parts)
        found.append(Way(name, parts, extra, ratio, norm))
    first = found[0]
    lines = [f"{key:>13}: {value}" for key, value in about.items()]
    lines += [
        "",
        f"{rows} pairs, towers of {LAYERS} layers of width {WIDTH} on {TOKENS} tokens; ratios to the plain step",
        HEADER,
    ]
    lines += [line(way, first) for way in found]
    met = all(abs(way.norm - first.norm) <= AGREE * first.norm for way in found)
    lines.append("gradients agree" if met else "GRADIENTS DIFFER")
    return Outcome("\n".join(lines), {"machine": about, "rows": rows, "ways": [asdict(w) for w in found]}, met)
