"""Where cases are measured: how a run is timed, what its peak of memory is, and what else is timed beside it."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from bench import floor, processes
from bench.cases import Case


class Device(Protocol):
    """name: of torch.device.  warm_ups: runs before the first that counts; small_warm_up: of a tiny problem, unless an
    implementation must see the real shapes."""

    name: str
    warm_ups: int
    small_warm_up: bool

    def available(self) -> float:
        """Bytes that a case may need."""

    def call(self, function: Callable[..., Any], *args: Any, deadline: float | None = None) -> Any:
        """function(*args), apart from what ran before as far as its memory needs it.  Raises processes.Failed."""

    def fresh(self) -> None:
        """Before the inputs of a run whose peak is wanted are made."""

    def timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """-> seconds of run(), and its result."""

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """The peak while run() runs and its result lives, beyond what was there before."""

    def graph(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """run() captured, to be replayed."""

    def gauge(self, case: Case) -> floor.Unit | None:
        """What is timed after each run of the fused op: the unit of the floor."""


class Cpu:
    """A process of its own for every case and implementation; wall time."""

    name, warm_ups, small_warm_up = "cpu", 1, True

    def available(self) -> float:
        return 0.9 * available_bytes()

    def call(self, function: Callable[..., Any], *args: Any, deadline: float | None = None) -> Any:
        return processes.call(function, *args, deadline=deadline)

    def fresh(self) -> None:
        map_large_allocations()

    def timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        began = time.perf_counter()
        result = run()
        return time.perf_counter() - began, result

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        return peak_extra_bytes(run)

    def graph(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run

    def gauge(self, case: Case) -> floor.Unit | None:
        return floor.gauge(case)


class Cuda:
    """The current CUDA or ROCm device.  Everything runs in this process: its allocator tells a run's memory apart."""

    name, warm_ups, small_warm_up = "cuda", 3, False

    def available(self) -> float:
        return 0.8 * torch.cuda.get_device_properties(0).total_memory

    def call(self, function: Callable[..., Any], *args: Any, deadline: float | None = None) -> Any:
        try:
            return function(*args)
        except Exception as error:  # a peer that fails is a row of the table
            raise processes.Failed(processes.reason(error)) from error

    def fresh(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """GPU time of run(), between two events of the stream."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        result = run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, result

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """The allocator's peak during run() beyond what was allocated before."""
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

    def gauge(self, case: Case) -> floor.Gauge | None:
        """The vendor's product of two random bfloat16 matrices of 8192 x 8192."""
        if case.op not in floor.DOT_FAMILY:
            return None
        a, b = (torch.randn(8192, 8192, device=self.name, dtype=torch.bfloat16) for _ in range(2))
        return floor.Gauge(2.0 * 8192**3, lambda: a @ b, "vendor GEMM, bfloat16", lambda run: self.timed(run)[0])


def peak_extra_bytes(function: Callable[[], Any]) -> int:
    """Peak resident bytes while function() runs and its result lives, beyond those before.

    Linux: VmHWM after writing 5 to /proc/self/clear_refs.  Elsewhere: growth of ru_maxrss, right in a fresh process.
    """
    gc.collect()
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def linux(key: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    try:
        clear.write_text("5")
        before = linux("VmRSS")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        function()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    result = function()
    peak = linux("VmHWM")
    del result
    return max(0, peak - before)


def map_large_allocations() -> None:
    """Has glibc map and unmap every allocation from 64 KiB up, so that freed memory is not kept and counted twice."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 16)  # M_TRIM_THRESHOLD


def available_bytes() -> int:
    """Memory that can be taken without swapping; a large number where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
