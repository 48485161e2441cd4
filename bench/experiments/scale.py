"""What `clip_loss` would cost on many GPUs, by calculation: `python bench/ scale`.  Nothing here was timed on a GPU.

Before that, measured: what `clip_loss` and `siglip_loss` move and get right on real ranks, beside other libraries.

Bytes and memory come from formulas that are checked, in the same output, against real ranks over gloo (sharded.py).
Time is simulated: matmul passes at a stated part of the tensor peak, links by alpha + bytes / beta.

    gather   all-gather of one tower, all-to-all of the columns' sums | 1 + 2 passes where exp(l) fits the stash, else
             1 + 3 | the same back, a reduce-scatter in float32.  Nothing of this overlaps with the passes.
    ring     W steps forward and backward; a step takes the longer of its blocks and of the shard that is on its way
"""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass

from bench import machine, processes
from bench.experiments.frame import Outcome

PEAK, EFFICIENCY = 989.4e12, 0.65  # H100 SXM, dense bfloat16; the part that large matmuls with epilogues reach
WIDTH, SIZE, WIDE = 768, 2, 4  # features in bfloat16, sums over ranks in float32
NODE = 8  # GPUs
MEMORY = 8e9  # bytes per GPU that a loss may take
STASH = 2e9  # of them, for exp(l) in bfloat16
PANEL = 2048  # rows of P at a time otherwise


@dataclass(frozen=True)
class Link:
    """A collective over many rings uses every port of a node; one ring of sends and receives uses one."""

    name: str
    collective: float  # bytes/s that every GPU receives in an all-gather
    alpha: float  # seconds per hop of one: seven of eight are within a node
    hop: float  # bytes/s between neighbours of the ring of shards, the slowest pair
    hop_alpha: float
    largest: int  # GPUs


LINKS = (
    Link("NVLink, 450 GB/s per direction, one node", 450e9, 3e-6, 450e9, 3e-6, NODE),
    Link("nodes with eight 400 Gb/s ports, one per GPU", NODE * 50e9, 4e-6, 50e9, 10e-6, 1024),
    Link("nodes with one 400 Gb/s port, 50 GB/s", 50e9, 4e-6, 50e9, 10e-6, 1024),
)


# ------------------------------------------------------------------------------------------------ formulas
def bytes_of(
    strategy: str, n: int, world: int, d: int, size: int, wide: int = WIDE, loss: str = "clip"
) -> tuple[int, int]:
    """(forward, backward) bytes between a rank and the others, n rows per rank; without the header.

    loss: "clip", or "siglip", which has no sums of columns and whose ring makes its gradients on the way forward.
    """
    others = (world - 1) * n
    if loss == "siglip":
        features, gradients = others * d * size, d * wide
        return (features, others * gradients) if strategy == "gather" else (features + world * n * gradients, 0)
    if strategy == "gather":
        return others * (d * size + 4), others * (d * wide + 4)
    return others * d * size + world * n * 8, others * (d * size + 8) + world * n * d * wide


def header_bytes(world: int) -> int:
    """Bytes of the headers that a rank receives: 32 int64 of every other rank."""
    return (world - 1) * 256


def cpu_memory(strategy: str, n: int, world: int, d: int, loss: str = "clip") -> int:
    """Peak beyond the inputs, float32 on the CPU, no stash.

    gather: the gathered tower, its packed copy, its gradient and that in the result's layout; ring: the same of one
    shard, and shards and sums that come and go.  siglip's positives, O(n d) in PyTorch, have a product and gradients of
    their own; in a ring those come when its buffers have gone.
    """
    local = 4 if loss == "clip" else 7
    return 4 * n * d * (4 * world + local if strategy == "gather" else 14)


def gpu_memory(strategy: str, n: int, world: int, d: int, stashed: bool) -> float:
    """Peak beyond the inputs, bfloat16: towers, float32 sums of gradients, and P, whole or in panels."""
    rows = n * (world if strategy == "gather" else 1)
    p = 2.0 * n * rows if stashed else 2.0 * min(n, PANEL) * rows
    linear = rows * d * (2 * SIZE + WIDE) + n * d * (SIZE + WIDE)
    return linear + p + (0 if strategy == "gather" else n * d * (SIZE + 3 * WIDE))


# ------------------------------------------------------------------------------------------------ time
def matmuls(rows: int, columns: int, passes: int, d: int = WIDTH) -> float:
    """Seconds of so many matmul passes."""
    return passes * 2.0 * rows * columns * d / (PEAK * EFFICIENCY)


@dataclass(frozen=True)
class Cost:
    seconds: float
    compute: float
    memory: float

    @property
    def exposed(self) -> float:
        """The part of the time in which links work and the tensor cores wait."""
        return 1 - self.compute / self.seconds


def gather(n: int, world: int, link: Link, d: int = WIDTH) -> Cost:
    """Passes and transfers one after the other."""
    stashed = 2.0 * n * n * world <= STASH
    compute = matmuls(n, n * world, 3 if stashed else 4, d)
    moved = sum(bytes_of("gather", n, world, d, SIZE)) + header_bytes(world)
    calls = 5 * (world - 1) * link.alpha  # header, all-gather, all-to-all twice, reduce-scatter, each W - 1 hops
    return Cost(compute + moved / link.collective + calls, compute, gpu_memory("gather", n, world, d, stashed))


def ring(n: int, world: int, link: Link, d: int = WIDTH) -> Cost:
    """Simulates one rank's steps; all ranks do the same at the same time."""
    now = header_bytes(world) / link.collective + (world - 1) * link.alpha
    for passes, ahead, behind in ((1, n * d * SIZE, n * 8), (3, n * (d * SIZE + 8), n * d * WIDE)):
        block, link_free, arrived = matmuls(n, n, passes, d), now, now
        for step in range(world):
            shard = now
            if step + 1 < world:  # the next shard leaves while this one is multiplied
                link_free = max(link_free, now) + link.hop_alpha + ahead / link.hop
                shard = link_free
            done = max(now + block, arrived)  # what travels behind has to be there to be added to
            link_free = max(link_free, done) + link.hop_alpha + behind / link.hop
            arrived = link_free
            now = max(done, shard)
        now = max(now, arrived)
    return Cost(now, matmuls(n, n * world, 4, d), gpu_memory("ring", n, world, d, False))


# ------------------------------------------------------------------------------------------------ printing
def plan() -> str:
    """Every N and number of GPUs, per link, and which strategy to take."""
    lines = [
        f"Per step (forward + backward) of clip_loss, D = {WIDTH}, bfloat16, H100 at {EFFICIENCY:.0%} of "
        f"{PEAK / 1e12:.0f} TFLOP/s.  CALCULATED, not measured.",
        f"Memory per GPU beyond features and their gradients; gather hands over to ring above {MEMORY / 1e9:.0f} GB, "
        "or where ring is faster.",
        "comm: the part of the time in which the tensor cores wait for links.  Passes: 1 + 2 where exp(l) fits "
        f"{STASH / 1e9:.0f} GB,",
        "else 1 + 3; ring 1 + 3.",
    ]
    for link in LINKS:
        lines += ["", link.name, f"{'N':>9} {'GPUs':>5} {'gather':>10} {'comm':>6} {'memory':>9}"]
        lines[-1] += f" {'ring':>10} {'comm':>6} {'memory':>9}   take"
        for exponent in range(15, 23):
            for world in (8, 64, 256, 1024):
                total = 2**exponent
                if world > link.largest or total // world < 128:
                    continue
                a, b = gather(total // world, world, link), ring(total // world, world, link)
                take = "ring" if a.memory > MEMORY or b.seconds < a.seconds else "gather"
                why = " (memory)" if take == "ring" and b.seconds >= a.seconds else ""
                cells = [f"{_ms(c.seconds)} {c.exposed:>6.0%} {c.memory / 1e9:>6.2f} GB" for c in (a, b)]
                lines.append(f"{_rows(total):>9} {world:>5} {cells[0]} {cells[1]}   {take}{why}")
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:>7.2f} ms"


def _rows(n: int) -> str:
    return f"{n // 2**20}M" if n >= 2**20 else f"{n // 2**10}k"


def validation(n: int = 4096, d: int = 512) -> tuple[str, bool]:
    """The formulas against real ranks -> what to print, and whether they agree."""
    import torch

    from bench.experiments import sharded

    lines = [
        f"Validation over gloo, float32, {n} rows of width {d} per rank: bytes by formula, by `traffic()` and as",
        "dispatched, header included; peak memory beyond what was resident before, largest of the ranks",
        f"{'':<20}{'W':>3} {'formula':>12} {'traffic()':>12} {'dispatched':>12}   {'memory: formula':>15} "
        f"{'measured':>10}",
    ]
    good = True
    for loss, world, strategy in itertools.product(("clip", "siglip"), (2, 4), ("gather", "ring")):
        name = f"{loss}_loss, {strategy}"
        answers = sharded.run(world, sharded.measure, name, n, d, torch.float32)
        formula = sum(bytes_of(strategy, n, world, d, 4, loss=loss)) + header_bytes(world)
        counted, wire = ({int(a[key]) for a in answers} for key in ("counted", "wire"))
        memory, peak = cpu_memory(strategy, n, world, d, loss), max(a["peak"] for a in answers)
        same = counted == wire == {formula} and 0.75 < peak / memory < 1.25
        good &= same
        lines.append(
            f"{name:<20}{world:>3} {formula:>12} {max(counted):>12} {max(wire):>12}   {memory / 1e6:>12.1f} MB "
            f"{peak / 1e6:>7.1f} MB   {'agrees' if same else 'DISAGREES'}"
        )
    return "\n".join(lines), good


def side_by_side(n: int = 1024, d: int = 256) -> tuple[str, bool]:
    """Every implementation that runs here -> a table per loss, and whether our gradients are exact."""
    clip, exact_clip = _table("clip", n, d)
    siglip, exact_siglip = _table("siglip", n, d)
    lines = [
        "Side by side, run here over gloo: gradients after DDP's averaging over those of one process in float64 (1 is",
        "right; off: the part of a tower's gradient that points elsewhere), passes of n x N x D, MB per rank and peak",
        f"memory in one step; float32, {n} rows of width {d} per rank for bytes and memory, 32 of 16 for gradients",
        *clip,
        "passes: from the source for open_clip, as published for the others; inf_cl's are of its Triton kernels.",
        "memeff: the scale is a constant, the memory Triton's interpreter's.",
        "",
        "The sigmoid loss, likewise",
        *siglip,
        "*: and the own block again, times 0.  Ours and siglip_kernel make the gradients in the forward; its kernel",
        "runs in Triton's interpreter here (the memory is that) and, as published, asks for a GPU when it is imported.",
    ]
    return "\n".join(lines), exact_clip and exact_siglip


def _table(loss: str, n: int, d: int) -> tuple[list[str], bool]:
    """A line per world and implementation of a loss, and whether the gradients of ours are exact."""
    import torch

    from bench.experiments import sharded

    leaves = sharded.LEAVES[: 2 + len(sharded.NUMBERS[loss])]
    heads = " ".join(f"{what:>8}" for what in leaves)
    lines = [f"{'':<29}{'W':>2} {heads} {'off':>6} {'passes':>8} {'MB fwd':>7} {'MB bwd':>7} {'peak MB':>8}"]
    good = True
    for world in (2, 4):
        for name, implementation in sharded.IMPLEMENTATIONS.items():
            if implementation.loss != loss:
                continue
            if importlib.util.find_spec(implementation.package) is None:
                lines.append(f"{name:<29}{world:>2} not installed here")
                continue
            ratio = sharded.run(world, sharded.ratios, name, 32, 16)[0]
            answers = sharded.run(world, sharded.measure, name, n, d, torch.float32)
            if name.startswith(f"{loss}_loss"):
                good &= all(abs(ratio[what] - 1) < 1e-6 for what in leaves)
            off = max(ratio["image off"], ratio["text off"])
            cells = " ".join(f"{ratio[what]:>8.4f}" for what in leaves)
            forward, backward, peak = (max(a[k] for a in answers) / 1e6 for k in ("forward", "backward", "peak"))
            lines.append(
                f"{name:<29}{world:>2} {cells} {off:>6.3f} {' + '.join(implementation.passes):>8} "
                f"{forward:>7.2f} {backward:>7.2f} {peak:>8.1f}"
            )
    return lines, good


def run(quick: bool = False) -> Outcome:
    """The validation and the side by side, printed as they are measured, then the plan; missed where a formula or a
    gradient is wrong."""
    processes.start_server()
    about = machine.describe()
    print(
        "\n".join(f"{key:>13}: {about[key]}" for key in ("cpu", "cores", "torch", "kernels", "date")) + "\n", flush=True
    )
    agreed = True
    for part in (validation, side_by_side):
        text, good = part()
        agreed &= good
        print(text + "\n", flush=True)
    wrong = "" if agreed else "\na formula or a gradient is WRONG"
    return Outcome(plan() + wrong, {}, agreed)
