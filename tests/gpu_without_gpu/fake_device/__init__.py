"""A CUDA device that does nothing, for the host's side of a step: real PyTorch, real Triton, launches counted.

One library stands in for libcuda, libcudart and cuBLAS (runtime.c, driver.c, blas.c; gcc builds it in seconds).  In a
process that preloads it, PyTorch's CUDA wheel finds an H200: its caching allocator, autograd, Triton's compiler and
launcher all run, on addresses that nobody touches.  So launches, tensor maps, allocations, waits and the allocator's
peak are exact, and host instructions are real.  Numbers in tensors mean nothing: a copy to the host is zeros.

    folder = fake_device.build(tmp_path)
    subprocess.run([sys.executable, ...], env=fake_device.environment(folder))

In that process `fake_device.counters.Counters` reads what was counted.  The CUDA C++ kernels bring their own runtime,
which refuses such a driver: `counters.planned_launches` counts their launches by their launcher's own plan.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = [HERE / name for name in ("runtime.c", "driver.c", "blas.c")]
TORCH_LIBRARIES = ("torch_cuda", "torch_cuda_linalg", "c10_cuda", "torch_python")
COMPUTES = re.compile(r"cublas\w*(gemm|Gemm|gemv|dot|Dot|trsm)\w*|cublasLtMatmul")


class Unavailable(RuntimeError):
    """The device cannot be built here; the message says why."""


def build(folder: Path) -> Path:
    """Builds the device into `folder` and returns it.  Raises Unavailable, CalledProcessError."""
    compiler, names = shutil.which("gcc"), shutil.which("nm")
    if compiler is None or names is None:
        raise Unavailable("there is no gcc with binutils")
    headers, libraries = _headers(), _torch_libraries()
    stubs = folder / "stubs.c"
    stubs.write_text(_stubs(names, libraries))
    command = [compiler, "-O2", "-w", "-shared", "-fPIC", f"-I{headers}", f"-I{HERE}", *map(str, SOURCES), str(stubs)]
    command += ["-o", str(folder / "libcuda.so.1"), "-Wl,-soname,libcuda.so.1", "-ldl"]
    subprocess.run(command, check=True)
    link = folder / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to("libcuda.so.1")
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Of a process that is to have the device that was built into `folder`."""
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / "libcuda.so.1"),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "FAKE_CUDA": str(folder / "libcuda.so.1"),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "0",
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "1",
    }


def _headers() -> Path:
    """The folder of cuda.h: a toolkit's, or that of the wheel which PyTorch's CUDA wheels bring."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    found = [header.parent for wheel in wheels for header in sorted(wheel.glob("*/include/cuda.h"))]
    found += [Path(root) / "include" for root in (os.environ.get("CUDA_HOME", "/usr/local/cuda"),)]
    for folder in found:
        if (folder / "cuda.h").exists() and (folder / "cuda_runtime_api.h").exists():
            return folder
    raise Unavailable("there are no CUDA headers: neither a toolkit nor the wheel nvidia-cuda-runtime")


def _torch_libraries() -> list[Path]:
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else Path()
    found = [folder / f"lib{name}.so" for name in TORCH_LIBRARIES]
    if not found[0].exists():
        raise Unavailable("this PyTorch is built without CUDA")
    return [library for library in found if library.exists()]


def _stubs(nm: str, libraries: list[Path]) -> str:
    """C for what PyTorch and Triton want, where the sources lack it: success; matmuls are counted."""
    listed = subprocess.run([nm, "-D", "--undefined-only", *map(str, libraries)], capture_output=True, text=True)
    wanted = set(re.findall(r" U ((?:cuda|cublas)[A-Z]\w*)", listed.stdout))
    spec = importlib.util.find_spec("triton.backends.nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        for source in Path(place).glob("*.c"):
            wanted |= set(re.findall(r"\b(cu[A-Z]\w+)\(", source.read_text()))
    lines = ['#include "fake.h"']
    for name in sorted(wanted):
        counts = f'fake_counts[GEMMS]++; fake_note("{name}"); ' if COMPUTES.fullmatch(name) else ""
        lines.append(f"EXPORT __attribute__((weak)) int {name}(void) {{ {counts}return 0; }}")
    return "\n".join([*lines, ""])
