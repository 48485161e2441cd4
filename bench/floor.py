"""The time that an op cannot beat on this machine, from rates measured in the same run.

    dot family      sum of 2 N^2 D / rate      over the passes, S = X Y^T, dX = G Y or dY = G^T X; rate: flop/s of the
                                               vendor's GEMM for that product on a panel of the logits, in the case's
                                               dtype or in float32, whichever is faster here
    critic family   c N^2 H / v / rate         c: instructions per vector of v pair-units (critic_code.py), one sweep
                                               rate: vector instructions a second on all torch threads (csrc/issue_rate)
                    + sum of 2 N D H / rate    over a critic's matmuls, a = X Wx^T and b = Z Wz^T and their gradients, D
                                               the width of X or Z, each at the vendor's rate for it
    cibr_loss       of its clip_loss and of its four critics, one after another; X is data and gets no gradient

The products of a gradient take the vendor longer than the logits (3 to 20 % on a Xeon with AVX-512, N >= 1024).
Each is timed in whichever of two arrangements is faster there: G Y or (Y^T G^T)^T, G^T X or (X^T G)^T.

The issue rate is that of independent multiplications, maxima and additions on full registers.  On Intel's server cores
it is two a cycle: 512-bit vectors go to ports 0 (with 1 fused into it) and 5, comparisons into a mask to 5 alone; on
a Zen 4 too, one that multiplies or compares into a mask and one that adds or takes a maximum.  Of AVX2's vectors a
Zen 2 to 4 issues four a cycle, a Zen 1 and an Intel core two.  c counts loads,
broadcasts and the loop's own instructions at the same price, because they are issued, although other ports take them:
a loop that overlapped them perfectly would go past this floor.  So the line below a table also has the time of the
instructions that compute alone, which nothing can go past, and the percent of the sweeps without the critics' matmuls.
Left out: the front end, the caches, the exponentials (N^2, not N^2 H), packing and merging (N H), noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Passes
from bench.critic_code import Sweep, chosen_sweep
from bench.disassembly import Unreadable
from bench.inputs import HIDDEN, TERMS, make_inputs
from bench.peers import fused_clip_passes
from cibr_kernels.dispatch import backends

ISSUE_ITERATIONS = 500_000  # 6 million vector instructions a thread, 1 to 2 ms: short enough to find both cores free
DOT_FAMILY = ("clip_loss", "siglip_loss")


def wall_seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Gauge:
    """What is timed beside a case, in the same rounds: `work` flops or instructions a call, `what` by name."""

    work: float
    run: Callable[[], object]
    what: str
    seconds: Callable[[Callable[[], object]], float] = wall_seconds

    def rate(self) -> float:
        """Runs once -> work per second."""
        return self.work / self.seconds(self.run)

    def rates(self) -> tuple[float, ...]:
        return (self.rate(),)


@dataclass(frozen=True)
class Together:
    """Work of several kinds, one after another; `rate` is how often a second all of it could be done."""

    parts: tuple[tuple[Gauge, float], ...]  # and how much of its work

    def rate(self) -> float:
        """Runs each kind once."""
        rates = {gauge: gauge.rate() for gauge in dict.fromkeys(gauge for gauge, _ in self.parts)}
        return 1 / sum(work / rates[gauge] for gauge, work in self.parts)


@dataclass(frozen=True)
class Critics:
    """What critics take: sweeps over pairs, beside the matmuls of a loss where there is one, and their own matmuls."""

    sweeps: Gauge | Together
    projections: Together
    what: str

    def rates(self) -> tuple[float, float]:
        """Runs each once -> instructions or floors a second of the sweeps; how often a second the projections."""
        return self.sweeps.rate(), self.projections.rate()


@dataclass(frozen=True)
class Vendor:
    """The vendor's matmuls: S = X Y^T alone, or that, G Y and G^T X."""

    products: tuple[Gauge, ...]
    what: str

    def rates(self) -> tuple[float, ...]:
        """Runs each once -> flop/s of each."""
        return tuple(product.rate() for product in self.products)


Unit = Gauge | Critics | Vendor


def gauge(case: Case) -> Unit | None:
    """The unit of a case's floor, warmed up; None where it has none."""
    if case.op in DOT_FAMILY:
        return vendor(case)
    if not backends.native_available():
        return None
    if case.op == "critic_moments":
        return Critics(issue_rate(), projections(case), "issue")
    try:
        sweeps = len(TERMS) * sweep_seconds(chosen_sweep("relu"), case.n, case.n, HIDDEN, case.backward, rate=1.0)
    except Unreadable:
        return None
    passes = fused_clip_passes(case)
    counts = (passes.logits, passes.gradients / 2, passes.gradients / 2)
    matmuls = zip(vendor(case).products, counts, strict=False)
    parts = [(one, count * 2 * case.n**2 * case.width) for one, count in matmuls]
    what = f"{passes.total} matmuls at the vendor's rates and {len(TERMS)} critics as critic_moments"
    return Critics(Together((*parts, (issue_rate(), sweeps))), projections(case), what)


def projections(case: Case) -> Together:
    """The matmuls of a case's critics, a panel of rows as torch.mm into memory that is there, warmed up."""
    gauges: dict[tuple[str, int], Gauge] = {}
    parts = []
    critics: Iterable[Any] = make_inputs(replace(case, n=1)).critics.values()
    for critic in critics:
        for width, data in ((critic.x_dim, case.op == "cibr_loss"), (critic.z_dim, False)):
            kinds = ("forward", "weight", "input") if case.backward else ("forward",)
            for kind in kinds[:2] if data else kinds:
                if (kind, width) not in gauges:
                    gauges[kind, width] = _projection(kind, case.n, width, critic.hidden)
                parts.append((gauges[kind, width], gauges[kind, width].work))
    return Together(tuple(parts))


def _projection(kind: str, n: int, width: int, hidden: int) -> Gauge:
    """Of x (n, width), w (hidden, width) and g (n, hidden): x w^T, g^T x or g w, in the faster of two arrangements."""
    x, w, g = torch.randn(n, width), torch.randn(hidden, width), torch.randn(n, hidden)
    left, right = {"forward": (x, w.T), "weight": (g.T, x), "input": (g, w)}[kind]
    return max((_mm(left, right), _mm(right.T, left.T)), key=_best)


def panel(case: Case) -> tuple[int, int, int]:
    return min(case.n, 2048), case.width, min(case.n, 8192)


def vendor(case: Case) -> Vendor:
    """The products of a panel as torch.mm into memory that is there, warmed up.

    Without bfloat16 units the vendor's bfloat16 is a fraction of its float32.
    """
    rows, width, columns = panel(case)
    x, y, g = torch.randn(rows, width), torch.randn(columns, width), torch.rand(rows, columns)
    names = tuple(dict.fromkeys((case.dtype, "float32")))
    typed = {name: tuple(t.to(getattr(torch, name)) for t in (x, y, g)) for name in names}
    logits = {name: _mm(x, y.T) for name, (x, y, _) in typed.items()}
    name = max(names, key=lambda name: _best(logits[name])) if len(names) > 1 else names[0]
    products = [logits[name]]
    if case.backward:
        x, y, g = typed[name]
        products += [max(pair, key=_best) for pair in ((_mm(g, y), _mm(y.T, g.T)), (_mm(g.T, x), _mm(x.T, g)))]
    return Vendor(tuple(products), f"vendor GEMM, {name}")


def _mm(a: Tensor, b: Tensor) -> Gauge:
    out = torch.zeros(a.shape[0], b.shape[1], dtype=a.dtype)
    torch.mm(a, b, out=out)
    return Gauge(2.0 * a.numel() * b.shape[1], lambda: torch.mm(a, b, out=out), "vendor GEMM")


def _best(one: Gauge) -> float:
    return max(one.rate() for _ in range(2))


def issue_rate() -> Gauge:
    """csrc/issue_rate on all torch threads."""
    module, issued = backends.compiled(), torch.zeros(1, dtype=torch.int64)
    threads = torch.get_num_threads()
    params = module.IssueRate()
    params.fill({"iterations": ISSUE_ITERATIONS, "threads": threads, "issued": issued})
    module.issue_rate(params)
    return Gauge(float(issued.item()) * threads, lambda: (module.issue_rate(params), issued), "issue")


def floor_seconds(passes: Passes, n: int, m: int, d: int, rates: tuple[float, ...]) -> float:
    """What matmuls of n x m x d take at `rates`: flop/s of X Y^T and, where there are gradients, of G Y and G^T X; or
    one for all."""
    each = passes.gradients / 2
    of_gradients = rates[1:] or 2 * rates
    return 2 * n * m * d * (passes.logits / rates[0] + sum(each / rate for rate in of_gradients))


def sweep_seconds(sweep: Sweep, n: int, m: int, h: int, backward: bool, rate: float, arithmetic: bool = False) -> float:
    """What one sweep over n x m pairs of h units takes at `rate` vector instructions a second."""
    parts = (sweep.scores, sweep.gradients) if backward else (sweep.scores,)
    return sum((c.arithmetic if arithmetic else c.instructions) / c.floats for c in parts) * n * m * h / rate


@dataclass(frozen=True)
class Floor:
    """Of sweeps: seconds, those of the arithmetic alone where known, and what the table says of them."""

    seconds: float
    arithmetic: float | None
    note: str


def critic_floor(case: Case, rate: float) -> Floor:
    """From the code of the kernel in use, at `rate`.  Raises Unreadable where that cannot be read."""
    sweep = chosen_sweep(case.activation)
    size = (case.n, case.n, case.width, case.backward, rate)
    parts = (sweep.scores, sweep.gradients) if case.backward else (sweep.scores,)
    costs = " + ".join(f"{c.instructions:.2f}" for c in parts), " + ".join(f"{c.arithmetic:g}" for c in parts)
    return Floor(
        sweep_seconds(sweep, *size),
        sweep_seconds(sweep, *size, arithmetic=True),
        f"floor: {costs[0]} instructions ({costs[1]} compute) per {sweep.scores.floats} pair-units at "
        f"{rate / 1e9:.1f} G/s",
    )
