"""`python bench/ gpu`: the fused ops against eager, compiled and peer implementations on the GPU of this machine.

Time: the implementations of a case in turn (A B C A B C ...), CUDA events around each run, after warm-ups.
Memory: the allocator's peak of one run beyond its inputs.  Agreement: loss and gradients against the fused op.
"""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from bench import gpu_cases, report
from bench.gpu_cases import IMPLEMENTATIONS, GpuCase, Loss, Tensors
from bench.measure import Gradients, Timed, agrees, difference, turns
from bench.peers import gigabytes

RESULTS = Path(__file__).parent / "results"
WARM_UPS, MAX_ROUNDS, BUDGET = 3, 20, 3.0  # runs, rounds, seconds of timing for each case
NO_GPU = "bench gpu: there is no CUDA or ROCm device here; `python bench/ gpu --predict` predicts without one"


class Device(Protocol):
    """Where runs happen: a GPU, or in tests the CPU."""

    name: str  # of torch.device
    memory: int  # bytes

    def seconds(self, run: Callable[[], Any]) -> float: ...
    def peak_bytes(self, run: Callable[[], Any]) -> int: ...
    def graph(self, run: Callable[[], Any]) -> Callable[[], Any]: ...
    def matmul_rate(self) -> float: ...


class Cuda:
    """The current CUDA or ROCm device."""

    name = "cuda"

    def __init__(self) -> None:
        self.memory = torch.cuda.get_device_properties(0).total_memory

    def seconds(self, run: Callable[[], Any]) -> float:
        """GPU time of run(), between two events of the stream."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """The allocator's peak during run() beyond what was allocated before."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def graph(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """run() captured -> its replay, which gives the same tensors each time."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = run()

        def replay() -> Any:
            graph.replay()
            return answer

        return replay

    def matmul_rate(self) -> float:
        """flop/s of the vendor's product of two random bfloat16 matrices of 8192 x 8192."""
        a, b = (torch.randn(8192, 8192, device=self.name, dtype=torch.bfloat16) for _ in range(2))
        seconds = [self.seconds(lambda: a @ b) for _ in range(13)]
        return 2 * 8192**3 / median(seconds[3:])


@dataclass
class Result:
    case: GpuCase
    rows: list[Timed]
    matmul_rate: float | None = None  # flop/s of the vendor's product, just before


def step(loss: Loss, tensors: Tensors, backward: bool) -> tuple[Tensor, Gradients]:
    """One forward, or a forward and the gradients of all that has one."""
    if not backward:
        with torch.no_grad():
            return loss(tensors), ()
    value = loss(tensors)
    grads = torch.autograd.grad(value, gpu_cases.leaves(tensors), allow_unused=True)
    return value.detach(), grads


def measure(case: GpuCase, device: Device, names: Sequence[str], budget: float = BUDGET) -> Result:
    """Runs the implementations of a case; timing takes about `budget` seconds and at least one round."""
    rate = device.matmul_rate() if case.matmul_passes else None
    tensors = gpu_cases.make_tensors(case, device.name)
    rows = [Timed(name) for name in names]
    runs: dict[str, Callable[[], Any]] = {}
    first: tuple[Tensor, Gradients] | None = None
    for row in rows:
        implementation = IMPLEMENTATIONS[case.op, row.implementation]
        needed = implementation.bytes(case)
        if needed > 0.8 * device.memory:
            row.note = f"needs about {gigabytes(needed)} of {gigabytes(device.memory)}: not run"
            continue
        try:
            loss = implementation.build(case)

            def run(loss: Loss = loss) -> Any:
                return step(loss, tensors, case.backward)

            for _ in range(WARM_UPS):
                answer = run()
            if first is None:
                first = answer
            else:
                found = difference(first, *answer)
                row.loss_diff, row.grad_diff = found["loss_diff"], found["grad_diff"]
                row.wrong = not agrees(case, row)
            del answer
            row.extra_bytes = device.peak_bytes(run)
            runs[row.implementation] = device.graph(run) if implementation.graph else run
        except ImportError as error:
            row.note = f"not installed: {error.name or error}"
        except Exception as error:  # a peer that fails is a row of the table; the fused op may not
            row.note, row.wrong = reason(error), row.implementation == "fused"
    seconds = {row.implementation: row.seconds for row in rows if row.implementation in runs}
    for name in turns(seconds, budget, MAX_ROUNDS):
        seconds[name].append(device.seconds(runs[name]))
    return Result(case, rows, rate)


def reason(error: Exception) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:100] if lines else ''}"


# ------------------------------------------------------------------------------------------------ text
HEADER = (
    f"  {'':<16}{'time ms':>9}  {'min .. max':<19}{'vs fused':>9}{'peak':>10}{'vs fused':>9}{'TFLOP/s':>9}"
    f"{'of matmul':>11}{'PREDICTED':>11}{'loss diff':>11}{'grad diff':>11}"
)


def table(result: Result, predicted: Mapping[tuple[str, str], float] = MappingProxyType({})) -> str:
    """A case's block.

    TFLOP/s: the products the fused op makes, over the row's own time; of matmul: over the vendor's rate.  predicted:
    milliseconds by case and implementation.
    """
    fused = result.rows[0]
    lines = [result.case.name, HEADER]
    for row in result.rows:
        ms = [1e3 * s for s in row.seconds]
        spread = f"{min(ms):.4g} .. {max(ms):.4g}" if ms else "-"
        passes = result.case.matmul_passes if row.implementation.startswith("fused") else None
        flops = passes and row.time and passes * 2 * result.case.n**2 * result.case.d / row.time
        cells = (
            _shown(1e3 * row.time, ".4g") if row.time else "-", spread, _ratio(row.time, fused.time),
            gigabytes(row.extra_bytes) if row.extra_bytes is not None else "-",
            _ratio(row.extra_bytes, fused.extra_bytes),
            _shown(flops / 1e12 if flops else None, ".0f"),
            f"{100 * flops / result.matmul_rate:.0f} %" if flops and result.matmul_rate else "-",
            _shown(predicted.get((result.case.name, row.implementation)), ".4g"),
            _shown(row.loss_diff, ".1e"), _shown(row.grad_diff, ".1e"),
        )  # fmt: skip
        widths = ("9", "", "9", "10", "9", "9", "11", "11", "11", "11")
        text = "".join(
            f"  {cell:<19}" if not width else f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)
        )
        wrong = "  WRONG: fails" if row is fused else "  WRONG: differs from fused"
        note = (f"  {row.note}" if row.note else "") + (wrong if row.wrong else "")
        lines.append(f"  {row.implementation:<16}{text}{note}")
    if result.matmul_rate:
        lines.append(f"  vendor's matmul just before: {result.matmul_rate / 1e12:.0f} TFLOP/s")
    return "\n".join(lines)


def recorded_predictions(gpu: str, file: Path = RESULTS / "gpu-predictions.txt") -> dict[tuple[str, str], float]:
    """PREDICTED milliseconds for a GPU, by case and implementation; an H200 has an H100's processors."""
    name = "H100" if "H200" in gpu else gpu
    found: dict[tuple[str, str], float] = {}
    here = False
    for line in file.read_text().splitlines() if file.exists() else ():
        if heading := re.match(r"(\S+) .*\(sm_\d+, ", line):
            here = heading[1] in name
        row = re.match(r"(\S+)\s+(\S+)\s+\d+(?:\s+[\d.-]+){4}\s+([\d.]+)\s", line)
        if here and row:
            found[row[1], row[2]] = float(row[3])
    return found


def _shown(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.3g}x" if value is not None and base else "-"


def describe(device: str) -> dict[str, str]:
    """The GPU and the versions that the numbers belong to."""
    from bench import machine

    found = machine.describe()
    about = {key: str(found[key]) for key in ("cpu", "python", "torch", "cibr_kernels", "date")}
    try:
        import triton

        about["triton"] = triton.__version__
    except ImportError:
        about["triton"] = "not installed"
    return {"gpu": device, "driver": _driver(), "cuda": str(torch.version.cuda or torch.version.hip), **about}


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def write(folder: Path, about: dict[str, str], results: Sequence[Result]) -> tuple[Path, Path]:
    """gpu-<device>.txt and .json in `folder`, each written beside itself and renamed."""
    stem = "gpu-" + re.sub(r"[^A-Za-z0-9]+", "-", about["gpu"]).strip("-").lower()
    expected = recorded_predictions(about["gpu"])
    text = "\n".join(f"{key:>13}: {value}" for key, value in about.items())
    text += "\n\n" + "\n\n".join(table(result, expected) for result in results) + "\n"
    paths = folder / f"{stem}.txt", folder / f"{stem}.json"
    with report.whole(paths[0]) as partial:
        partial.write_text(text)
    report.write(paths[1], {"machine": about, "results": as_json(results)})
    return paths


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [{**asdict(result), "name": result.case.name} for result in results]


def main(file: Path | None = None, *, predict: bool = False, search: bool = False, only: Sequence[str] = ()) -> int:
    """-> 0; 1 when the fused op fails or another disagrees with it; 2 without a GPU or for an unknown case."""
    cases = [c for c in gpu_cases.CASES if not only or any(c.name.startswith(name) for name in only)]
    if not cases:
        known = ", ".join(c.name for c in gpu_cases.CASES)
        print(f"bench gpu: no case is called {' or '.join(only)}; known are {known}", file=sys.stderr)
        return 2
    if predict:
        return _predict(file, cases, search)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    device, about = Cuda(), describe(torch.cuda.get_device_name())
    print("\n".join(f"{key:>13}: {value}" for key, value in about.items()) + "\n", flush=True)
    if search:
        from bench.static.search import measured

        return measured(device, cases)
    results, expected = [], recorded_predictions(about["gpu"])
    for case in cases:
        results.append(measure(case, device, gpu_cases.implementations(case)))
        print(table(results[-1], expected) + "\n", flush=True)
    print("wrote " + ", ".join(map(str, write(RESULTS, about, results))))
    if file:
        report.write(file, as_json(results))
    wrong = [f"{r.case.name} {row.implementation}" for r in results for row in r.rows if row.wrong]
    if wrong:
        print(f"WRONG RESULTS: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _predict(file: Path | None, cases: Sequence[GpuCase], search: bool) -> int:
    try:
        import triton  # noqa: F401
    except ImportError:
        print("bench gpu --predict compiles the Triton kernels: pip install triton", file=sys.stderr)
        return 2
    from bench.static import predictions
    from bench.static.search import predicted

    if search:
        return predicted(cases)
    rows = predictions.main(cases)
    if file:
        report.write(file, predictions.as_json(rows))
    return 0
