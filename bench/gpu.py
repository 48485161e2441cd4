"""`python bench/ gpu`: the fused ops against eager, compiled and peer implementations on the GPU of this machine.

What is measured is measure.py's, on devices.Cuda; the floor is every pass at the rate of the vendor's bfloat16 matmul.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench import cases as all_cases
from bench import measure, report
from bench.cases import Case
from bench.devices import Cuda
from bench.measure import Result

RESULTS = Path(__file__).parent / "results"
BUDGET = 3.0  # seconds of timing for each case
NO_GPU = "bench gpu: there is no CUDA or ROCm device here; `python bench/ gpu --predict` predicts without one"


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
    text += "\n\n" + "\n\n".join(report.table(result, expected) for result in results) + "\n"
    paths = folder / f"{stem}.txt", folder / f"{stem}.json"
    with report.whole(paths[0]) as partial:
        partial.write_text(text)
    report.write(paths[1], {"machine": about, "results": report.as_json(results)})
    return paths


def main(file: Path | None = None, *, predict: bool = False, search: bool = False, only: Sequence[str] = ()) -> int:
    """-> 0; 1 when the fused op fails or another disagrees with it; 2 without a GPU or for an unknown case."""
    cases = [c for c in all_cases.GPU_CASES if not only or any(c.name.startswith(name) for name in only)]
    if not cases:
        known = ", ".join(c.name for c in all_cases.GPU_CASES)
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
        results.append(measure.measure(case, BUDGET, device=device))
        print(report.table(results[-1], expected) + "\n", flush=True)
    print("wrote " + ", ".join(map(str, write(RESULTS, about, results))))
    if file:
        report.write(file, report.as_json(results))
    wrong = [f"{r.case.name} {row.implementation}" for r in results for row in r.rows if row.wrong]
    if wrong:
        print(f"WRONG RESULTS: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _predict(file: Path | None, cases: Sequence[Case], search: bool) -> int:
    if not _compiles("--predict"):
        return 2
    from bench.static import predictions
    from bench.static.search import predicted

    if search:
        return predicted(cases)
    rows = predictions.main(cases)
    if file:
        report.write(file, predictions.as_json(rows))
    return 0


def columns(file: Path | None = None) -> int:
    """-> 0; 2 without Triton."""
    if not _compiles("--columns"):
        return 2
    from bench.static import columns

    costs = columns.main()
    if file:
        report.write(file, [asdict(cost) for cost in costs])
    return 0


def _compiles(flag: str) -> bool:
    """Whether Triton is there; says so where it is not."""
    if importlib.util.find_spec("triton") is None:
        print(f"bench gpu {flag} compiles the Triton kernels: pip install triton", file=sys.stderr)
        return False
    return True
