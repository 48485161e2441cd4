"""`bench gpu --predict`: what every case should take on GPUs that are not here, ours and the peers' that are installed.

The launchers run on fake tensors (static/record.py), their kernels are compiled for the target, and predict.py turns
instructions, flop and bytes into time.  Nothing is measured; the header says what is assumed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

import cibr_kernels as ck
from bench import cases as all_cases
from bench.cases import Case, gpu_case
from bench.floor import DOT_FAMILY
from bench.inputs import make_inputs
from bench.peers import IMPLEMENTATIONS, fused
from bench.processes import reason
from bench.static import predict, record, sass
from bench.static.gpus import GPUS

PEERS = {"clip_loss": ("open_clip", "eager", "inf_cl", "memeff"), "siglip_loss": ("open_clip", "siglip_kernel")}
DETAILED = ("clip_loss-train-65536x512", "critic_moments-train-32768x512")
PEER_SIZES = ((65536, 512), (65536, 768))
# what our kernels find in device memory on unit-norm features: the fixed offset holds (dot/lse/triton_forward.py)
MEMORY = {"mode": 0, "stash_shift": 0.0}


@dataclass(frozen=True)
class Published:
    """A time that a peer's author measured; forward and backward, bfloat16."""

    op: str
    implementation: str
    n: int
    width: int
    gpu: str
    milliseconds: float
    source: str


PUBLISHED = [
    Published("clip_loss", "memeff", 65536, 512, "A100 40GB PCIe", 201, "memeff 0.3.1, README"),
    Published("siglip_loss", "siglip_kernel", 65536, 768, "GH200", 48.8, "siglip-kernel 0.1.2, README"),
]


@dataclass
class Row:
    """One implementation of one case on one GPU."""

    case: str
    implementation: str
    capability: int
    launches: int = 0
    tflop: float = 0.0
    passes: float | None = None
    gigabytes: float = 0.0
    bound_ms: float = 0.0  # every pipe at full rate: no schedule of these launches is faster
    predicted_ms: float | None = None  # None where a kernel cannot be launched, or its loops cannot be counted
    percent_of_peak: float | None = None
    limit: str = ""
    note: str = ""


def record_step(case: Case, implementation: str, capability: int) -> list[record.Event]:
    """What a forward, and a backward where the case has one, launch.  Raises ImportError where a peer is missing."""
    with record.recording(capability) as recorder:
        if implementation == "fused":
            loss = fused(case, "triton")
        else:
            loss = IMPLEMENTATIONS[case.op, implementation].build(case)
        inputs = make_inputs(case, "cuda")
        recorder.events.clear()
        if case.backward:
            record.backward(loss(inputs))
        else:
            with torch.no_grad():
                loss(inputs)
    return recorder.events


def row(case: Case, implementation: str, capability: int) -> tuple[Row, predict.Step | None]:
    """The prediction of a case, and its parts; a peer's row has a note where there is none, our own failure raises."""
    found = Row(case.name, implementation, capability)
    try:
        events = record_step(case, implementation, capability)
        step = predict.predict(events, capability, MEMORY)
    except ImportError as error:
        found.note = f"not installed: {error.name or error}"
        return found, None
    except Exception as error:  # a peer that does not compile is a result, not the end of the table
        if implementation == "fused":
            raise
        found.note = reason(error)
        return found, None
    found.launches = int(step.total("launches"))
    found.tflop = step.total("flops") / 1e12
    found.passes = step.passes(case.n, case.n, case.width) if case.op in DOT_FAMILY else None
    found.gigabytes = step.total("bytes") / 1e9
    found.bound_ms, found.predicted_ms = 1e3 * step.total("bound"), 1e3 * step.total("seconds")
    found.percent_of_peak, found.limit = step.percent_of_peak, step.limit
    found.note = "; ".join(dict.fromkeys(part.note for part in step.parts if part.note))
    if "cannot be launched" in found.note or "not predicted" in found.note:
        found.predicted_ms = found.percent_of_peak = None
        return found, None
    return found, step


def jobs(capability: int, cases: Sequence[Case]) -> Iterable[tuple[Case, str]]:
    """Ours for every case; the peers for training steps of two sizes."""
    for case in cases:
        yield case, "fused"
        if case.backward and case.tier != "stash" and (case.n, case.width) in PEER_SIZES:
            yield from ((case, peer) for peer in PEERS.get(case.op, ()))


HEADER = (
    f"{'case':<34}{'':<14}{'launches':>9}{'TFLOP':>8}{'passes':>8}{'GB':>8}{'bound ms':>10}{'PREDICTED ms':>14}"
    f"{'of peak':>9}  what limits the longest part"
)


def line(r: Row) -> str:
    if not r.launches:
        return f"{r.case:<34}{r.implementation:<14}{r.note}"
    passes = f"{r.passes:.2f}" if r.passes is not None else "-"
    peak = f"{r.percent_of_peak:.0f} %" if r.tflop and r.percent_of_peak is not None else "-"
    time = "-" if r.predicted_ms is None else f"{r.predicted_ms:.2f}"
    return (
        f"{r.case:<34}{r.implementation:<14}{r.launches:>9}{r.tflop:>8.2f}{passes:>8}{r.gigabytes:>8.1f}"
        f"{r.bound_ms:>10.2f}{time:>14}{peak:>9}  {r.limit}{f'  [{r.note}]' if r.note else ''}"
    )


def parts_table(step: predict.Step) -> str:
    """Every kernel of a step that takes 1 % of it: milliseconds that each pipe is busy at full rate."""
    pipes = ("tensor", "exp", "fma", "alu", "shared", "issue", "cache", "memory")
    head = f"    {'kernel':<36}{'launches':>9}{'PREDICTED':>11}" + "".join(f"{p:>8}" for p in pipes) + "  limit"
    lines = [head]
    for part in sorted(step.parts, key=lambda part: -part.seconds):
        if part.seconds > 0.01 * step.total("seconds"):
            limit = part.limits.most_common(1)[0][0] if part.limits else ""
            lines.append(
                f"    {part.name:<36}{part.launches:>9}{1e3 * part.seconds:>11.2f}"
                + "".join(f"{1e3 * part.pipes[p]:>8.2f}" for p in pipes)
                + f"  {limit}"
            )
    return "\n".join(lines)


def assumptions() -> str:
    """What the predictions stand on."""
    import triton

    ptxas = re.search(r"V[\d.]+", sass.run(sass.tool("ptxas"), "--version"))
    tensor = ", ".join(f"{GPUS[c].name} {e:.2f}" for c, e in predict.TENSOR_EFFICIENCY.items())
    return "\n".join(
        (
            "PREDICTIONS, not measurements: no GPU was used.  Launches, flop and bytes are those of the launchers,",
            "run on fake tensors; cycles come from the SASS that the compiler makes.  How: bench/static/predict.py.",
            f"versions: cibr_kernels {ck.__version__}, torch {torch.__version__}, triton {triton.__version__}, "
            f"ptxas {ptxas[0] if ptxas else '?'}",
            f"assumed:  tensor cores at {tensor} of their peak (ours and the vendor's GEMM), other pipes at "
            f"{predict.PIPE_EFFICIENCY:.2f},",
            f"          device memory at {predict.MEMORY_EFFICIENCY:.2f}, {predict.CACHE_RATE} bytes per clock and "
            f"processor from the L2 cache, {1e6 * predict.START:.0f} us between kernels; no latencies, no power limit",
            "bound:    every pipe at its full rate.  of peak: executed matrix flop over dense bfloat16 peak.",
        )
    )


def published(rows: Sequence[Row]) -> list[str]:
    """The authors' own times beside the prediction for the same kernel: how far such predictions can be off."""
    near = {"A100 40GB PCIe": 80, "GH200": 90}
    lines = []
    for p in PUBLISHED:
        name = gpu_case(p.op, p.n, p.width).name
        own = [r for r in rows if (r.case, r.implementation, r.capability) == (name, p.implementation, near[p.gpu])]
        r = own[0] if own else None
        if r and r.predicted_ms:
            lines.append(
                f"  {p.implementation} {p.n}x{p.width}: published {p.milliseconds:g} ms on {p.gpu} ({p.source}); "
                f"predicted {r.predicted_ms:.1f} ms on {GPUS[r.capability].name}: "
                f"{p.milliseconds / r.predicted_ms:.2f}x"
            )
        else:
            lines.append(
                f"  {p.implementation} {p.n}x{p.width}: published {p.milliseconds:g} ms on {p.gpu} ({p.source})"
            )
    return lines


def main(cases: Sequence[Case] = tuple(all_cases.GPU_CASES), targets: Sequence[int] = tuple(GPUS)) -> list[Row]:
    """Prints the tables, target after target -> all rows."""
    print(assumptions())
    rows: list[Row] = []
    for capability in targets:
        target = GPUS[capability]
        rates = f"{target.peak / 1e12:.0f} TFLOP/s, {target.bandwidth / 1e12:.2f} TB/s"
        print(f"\n{target.name} (sm_{capability}, {rates})\n{HEADER}")
        detail: list[tuple[str, predict.Step]] = []
        for case, implementation in jobs(capability, cases):
            made, step = row(case, implementation, capability)
            rows.append(made)
            print(line(made), flush=True)
            shown = case.name.removesuffix("-stash") in DETAILED
            if step and implementation == "fused" and shown:
                detail.append((case.name, step))
        for name, step in detail:
            print(f"  {name}, ms that each pipe is busy at full rate:\n{parts_table(step)}")
    if any(r.implementation != "fused" for r in rows):
        print("\npublished times:\n" + "\n".join(published(rows)))
    return rows


def as_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    return [asdict(r) for r in rows]
