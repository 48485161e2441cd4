"""CUDA C++ on the CPU: `nvcc -ptx` for a target, then the kernels of that PTX executed by the emulator on CPU tensors.

    import nvcc

    ptx = nvcc.compile_ptx(ROOT / "csrc/my_op/cuda.cu", "90a", include=[ROOT / "csrc"])   # about 1 s, cached on disk
    y = torch.empty(1000)
    nvcc.run(ptx, "double_it", grid=(8,), block=(128,), args=[x, y, 1000], capability=90)  # results land in y

for `extern "C" __global__ void double_it(const float* x, float* y, int n)`.  Tensors are passed as pointers
(contiguous, any dtype), Python ints and floats by the parameter's declared type.  Dynamic shared memory is
`shared_bytes`.  Checks are the emulator's: see `emulator/__init__.py`.  A test that needs nvcc asks `nvcc.find()` and
skips on None.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import emulator
import numpy as np
import torch
from torch import Tensor

ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120")
OPTIONS = ("-std=c++17", "-lineinfo")
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
CACHE = Path(os.environ.get("CIBR_PTX_CACHE") or Path(tempfile.gettempdir()) / f"cibr_ptx_{os.getuid()}")


@lru_cache
def find() -> Path | None:
    """nvcc: of CUDA_HOME, of PATH, or of the PyPI package nvidia-cuda-nvcc (nvidia/cu*/bin); None if there is none."""
    places = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = shutil.which("nvcc")
    if found:
        places.append(Path(found).parent)
    package = importlib.util.find_spec("nvidia")
    for root in (package.submodule_search_locations or []) if package else []:
        places += sorted(Path(root).glob("*/bin"))
    return next((p / "nvcc" for p in places if os.access(p / "nvcc", os.X_OK)), None)


@lru_cache
def version() -> str:
    """What `nvcc --version` prints; the last line is its build."""
    return subprocess.run([_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout.strip()


@lru_cache
def include_directory() -> Path | None:
    """Where the toolkit's headers (cuda_bf16.h, ...) are, for a host compiler; None if there is no toolkit."""
    if find() is None:
        return None
    dry = subprocess.run([_nvcc(), "--dryrun", "-E", "x.cu"], capture_output=True, text=True).stderr
    candidates = [
        Path(part[2:]) for line in dry.splitlines() for part in line.replace('"', " ").split() if part[:2] == "-I"
    ]
    candidates += [_nvcc().resolve().parent.parent / "include"]
    return next((c.resolve() for c in candidates if (c / "cuda_bf16.h").exists()), None)


def files(source: Path, include: Sequence[Path] = ()) -> list[Path]:
    """The source and what it includes in quotes, directly or not, from beside the includer or under `include`.

    Both branches of an #if count.  The toolkit's headers, in angle brackets, go with its version.
    """
    found = [Path(source)]
    for path in found:
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            places = [place / name for place in (path.parent, *include)]
            header = next((place for place in places if place.exists()), None)
            if header is not None and header not in found:
                found.append(header)
    return found


def meaning(source: Path, include: Sequence[Path] = ()) -> list[str]:
    """The text of `files` without comments and layout: what nvcc is given, whatever the checkout's path.

    PTX is not the same text from another path: names of internal linkage have the path's hash in them.
    """
    return [_without_comments(path.read_text()) for path in files(source, include)]


def _without_comments(text: str) -> str:
    parts = r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/'
    text = re.sub(parts, lambda part: part[1] or " ", text, flags=re.DOTALL)
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


def compile_ptx(
    source: Path,
    arch: str,
    defines: Mapping[str, object] | Sequence[str] = (),
    include: Sequence[Path] = (),
) -> str:
    """The PTX of a .cu file; `arch` is one of ARCHITECTURES.

    Cached on disk under the content of `files`, the options and nvcc's version.  Raises RuntimeError with nvcc's
    messages if it does not compile.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch {arch!r} is not one of {ARCHITECTURES}")
    source = Path(source)
    named = [f"{k}={v}" for k, v in defines.items()] if isinstance(defines, Mapping) else list(defines)
    options = [f"-arch=sm_{arch}", *OPTIONS, *(f"-D{d}" for d in named)]
    key = hashlib.sha256("\0".join([version(), *options, source.name]).encode())
    for path in files(source, include):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    cached = CACHE / f"{source.stem}-{arch}-{key.hexdigest()[:24]}.ptx"
    if not cached.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(f".{os.getpid()}.part")
        command = [_nvcc(), "-ptx", *options, *(f"-I{d}" for d in include), "-o", part, source]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
        part.replace(cached)
    return cached.read_text()


def run(
    ptx: str,
    kernel_name: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Tensor | int | float],
    shared_bytes: int = 0,
    capability: int = 90,
    **options: object,
) -> None:
    """Executes one kernel of `ptx` on CPU tensors; raises emulator.PtxError on what it checks.

    shared_bytes: dynamic shared memory; static is added.  options go to emulator.launch (known=, batch=, blocks=, ...).
    """
    kernel = _kernel(ptx, kernel_name)
    if len(args) != len(kernel.params):
        raise TypeError(f"{kernel_name} has {len(kernel.params)} parameters, got {len(args)} arguments")
    values = [_value(a) for a in args]
    emulator.launch(
        kernel, grid, block, values, dynamic_shared=shared_bytes, shared_limit=SHARED_BYTES[capability], **options
    )


@lru_cache(maxsize=64)
def _kernel(ptx: str, name: str) -> emulator.Kernel:
    return emulator.Kernel(ptx, name)


def _value(value: Tensor | int | float) -> np.ndarray | int | float:
    if not isinstance(value, Tensor):
        return value
    assert value.is_contiguous() and value.device.type == "cpu"
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    return value.detach().view(raw).numpy()  # shares memory: results land in the tensor


def _nvcc() -> Path:
    found = find()
    if found is None:
        raise RuntimeError("nvcc was not found in CUDA_HOME, PATH or the package nvidia-cuda-nvcc")
    return found
