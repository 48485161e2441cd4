"""What the numbers were measured on."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch

import cibr_kernels as ck
from cibr_kernels.dispatch import backends

ISA = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")


def describe() -> dict[str, str | float]:
    """Processor, memory, system and versions; the JSON file carries it and `python bench/` prints it."""
    cpu = _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    flags = (_field("/proc/cpuinfo", "flags") or _field("/proc/cpuinfo", "Features")).split()
    memory = _field("/proc/meminfo", "MemTotal").split()
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "isa": " ".join(flag for flag in ISA if flag in flags),
        "memory_gb": round(int(memory[0]) * 1024 / 1e9, 1) if memory else 0,
        "load": " ".join(f"{x:.1f}" for x in os.getloadavg()),
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_cpu": f"{torch.backends.cpu.get_cpu_capability()}, mkl {torch.backends.mkl.is_available()}, "
        f"onednn {torch.backends.mkldnn.is_available()}, openmp {torch.backends.openmp.is_available()}",
        "cibr_kernels": ck.__version__,
        "kernels": f"compiled by {backends.compiled().compiler}, {backends.compiled().isa()} in use"
        if ck.native_available()
        else "NOT BUILT: fused rows run the N x N reference",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def processor() -> str:
    """What a record of speeds is kept for, such as "GenuineIntel 6-85": virtual machines hide the name."""
    vendor, *numbers = (_field("/proc/cpuinfo", key) for key in ("vendor_id", "cpu family", "model\t"))
    return f"{vendor} {'-'.join(numbers)}" if vendor else platform.processor() or platform.machine()


def _field(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
