"""`python bench/ gpu`: the fused ops against eager, compiled and peer implementations on the GPU of this machine.

Time: the implementations of a case in turn (A B C A B C ...), CUDA events around each run, after warm-ups.
Memory: the allocator's peak of one run beyond its inputs.  Agreement: loss and gradients against the fused op.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bench import gpu_cases
from bench.gpu_cases import IMPLEMENTATIONS, GpuCase, Loss, Tensors
from bench.measure import Gradients, Timed, agrees, difference, turns
from bench.peers import gigabytes

RESULTS = Path(__file__).parent / "results"
WARM_UPS, MAX_ROUNDS, BUDGET = 3, 20, 10.0  # runs, rounds, seconds of timing for each case
NO_GPU = "bench gpu: there is no CUDA or ROCm device here; `python bench/ gpu --predict` predicts without one"


class Device(Protocol):
    """Where runs happen: a GPU, or in tests the CPU."""

    name: str  # of torch.device
    memory: int  # bytes

    def seconds(self, run: Callable[[], Any]) -> float: ...
    def peak_bytes(self, run: Callable[[], Any]) -> int: ...


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


@dataclass
class Result:
    case: GpuCase
    rows: list[Timed]


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
            runs[row.implementation] = run
        except ImportError as error:
            row.note = f"not installed: {error.name or error}"
        except Exception as error:  # a peer that fails is a row of the table; the fused op may not
            row.note, row.wrong = reason(error), row.implementation == "fused"
    seconds = {row.implementation: row.seconds for row in rows if row.implementation in runs}
    for name in turns(seconds, budget, MAX_ROUNDS):
        seconds[name].append(device.seconds(runs[name]))
    return Result(case, rows)


def reason(error: Exception) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:100] if lines else ''}"


# ------------------------------------------------------------------------------------------------ text
HEADER = (
    f"  {'':<14}{'time ms':>9}  {'min .. max':<19}{'vs fused':>9}{'peak':>10}{'vs fused':>9}{'TFLOP/s':>9}"
    f"{'loss diff':>11}{'grad diff':>11}"
)


def table(result: Result) -> str:
    """A case's block.  TFLOP/s: the products the fused op makes, over the row's own time."""
    fused = result.rows[0]
    lines = [result.case.name, HEADER]
    for row in result.rows:
        ms = [1e3 * s for s in row.seconds]
        spread = f"{min(ms):.4g} .. {max(ms):.4g}" if ms else "-"
        passes = result.case.matmul_passes if row is fused else None
        flops = passes and row.time and passes * 2 * result.case.n**2 * result.case.d / row.time
        cells = (
            _shown(1e3 * row.time, ".4g") if row.time else "-", spread, _ratio(row.time, fused.time),
            gigabytes(row.extra_bytes) if row.extra_bytes is not None else "-",
            _ratio(row.extra_bytes, fused.extra_bytes),
            _shown(flops / 1e12 if flops else None, ".0f"), _shown(row.loss_diff, ".1e"), _shown(row.grad_diff, ".1e"),
        )  # fmt: skip
        widths = ("9", "", "9", "10", "9", "9", "11", "11")
        text = "".join(
            f"  {cell:<19}" if not width else f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)
        )
        wrong = "  WRONG: fails" if row is fused else "  WRONG: differs from fused"
        note = (f"  {row.note}" if row.note else "") + (wrong if row.wrong else "")
        lines.append(f"  {row.implementation:<14}{text}{note}")
    return "\n".join(lines)


def _shown(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.3g}x" if value is not None and base else "-"


def describe(device: str) -> dict[str, str]:
    """The GPU and the versions that the numbers belong to."""
    from bench import machine

    found = machine.describe()
    about = {key: str(found[key]) for key in ("python", "torch", "cibr_kernels", "date")}
    try:
        import triton

        about["triton"] = triton.__version__
    except ImportError:
        about["triton"] = "not installed"
    return {"gpu": device, "cuda": str(torch.version.cuda or torch.version.hip), **about}


def write(folder: Path, about: dict[str, str], results: Sequence[Result]) -> tuple[Path, Path]:
    """gpu-<device>.txt and .json in `folder`, each written beside itself and renamed."""
    stem = "gpu-" + re.sub(r"[^A-Za-z0-9]+", "-", about["gpu"]).strip("-").lower()
    text = "\n".join(f"{key:>13}: {value}" for key, value in about.items())
    text += "\n\n" + "\n\n".join(table(result) for result in results) + "\n"
    rows = [{**asdict(result), "name": result.case.name} for result in results]
    data = json.dumps({"machine": about, "results": rows}, indent=1) + "\n"
    paths = folder / f"{stem}.txt", folder / f"{stem}.json"
    for path, content in zip(paths, (text, data), strict=True):
        partial = path.with_name(path.name + ".partial")
        partial.write_text(content)
        os.replace(partial, path)
    return paths


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
        from bench import gpu_search

        return gpu_search.measured(device, cases)
    results = []
    for case in cases:
        results.append(measure(case, device, gpu_cases.implementations(case)))
        print(table(results[-1]) + "\n", flush=True)
    print("wrote " + ", ".join(map(str, write(RESULTS, about, results))))
    if file:
        file.write_text(json.dumps([{**asdict(r), "name": r.case.name} for r in results], indent=1) + "\n")
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
    from bench import gpu_predictions, gpu_search

    if search:
        return gpu_search.predicted(cases)
    rows = gpu_predictions.main(cases)
    if file:
        file.write_text(json.dumps(gpu_predictions.as_json(rows), indent=1) + "\n")
    return 0
