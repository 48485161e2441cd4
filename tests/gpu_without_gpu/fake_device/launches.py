"""A program for the fake device: what launches pass, by Triton's own path and around it, and what was compiled.

    python -m fake_device.launches

Prints JSON: {"different": cases whose launches pass other bytes, "launches": how many were compared, "compiled":
kernels after each of SIZES, "warm": kernels after a warmup and after steps of other sizes, "seen": launches of a step
that a hook is told of}.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable
from typing import Any

import torch

import cibr_kernels as ck
from bench.guards import host
from bench.processes import leave
from cibr_kernels.dispatch import backends, plans, triton_relaunch
from fake_device.counters import Counters

CASES = ("clip_loss 1024x512", "clip_loss 1000x512", "siglip_loss 1024x512", "critic_moments-triton 100x64")
SIZES = (1024, 999, 17, 1000, 4096, 200, 33, 8192, 1, 2050)
WORDS = {"u64": 8, "b64": 8, "s64": 8, "f64": 8, "u32": 4, "b32": 4, "s32": 4, "f32": 4, "u8": 1, "b8": 1}
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr[^,\n]*?)?\s*\S*?(?:\[(\d+)\])?[,\n)]")


def register(library: Any, compiled: Any) -> None:
    """Tells the device how large the parameters of a compiled kernel are, by its PTX."""
    entry = re.search(r"\.entry[^{]*", compiled.asm["ptx"])
    assert entry is not None
    sizes = [int(size) if size else WORDS[kind] for kind, size in PARAMETER.findall(entry[0])]
    library.fake_register(ctypes.c_void_p(compiled.function), len(sizes), (ctypes.c_int * len(sizes))(*sizes))


def passed(library: Any, step: Callable[[], Any]) -> bytes:
    """Name, grid, block, shared memory, stream and parameters of every launch of a step."""
    capturing = ctypes.c_int.in_dll(library, "fake_capturing")
    length = ctypes.c_size_t.in_dll(library, "fake_bytes_length")
    capturing.value, length.value = 1, 0
    step()
    capturing.value = 0
    return bytes((ctypes.c_uint8 * (1 << 22)).in_dll(library, "fake_bytes")[: length.value])


def differs(library: Any, step: Callable[[], Any]) -> bool:
    """Whether a step, made before, passes by Triton's own path other bytes than around it."""
    for compiled in triton_relaunch.kernels():
        register(library, compiled)
    ours = passed(library, step)
    with triton_relaunch.disabled():
        theirs = passed(library, step)
    return ours != theirs or not ours


def main() -> None:
    counters = Counters()
    library, names = counters.library, backends.NAMES
    torch.autograd.set_multithreading_enabled(False)
    different, launches = [], 0
    for case in CASES:
        backends.NAMES = ("triton", "reference") if "-triton" in case else names
        step = host._step(case)
        step()
        counters.reset()
        different += [case] if differs(library, step) else []
        launches += counters.read()["triton"] // 2
    triton_relaunch.clear()
    compiled = []
    for n in SIZES:
        host._step(f"clip_loss {n}x512")()
        compiled.append(len(triton_relaunch.kernels()))
    triton_relaunch.clear()
    ck.warmup(1024, 512, losses=("clip_loss", "siglip_loss"))
    warm = [len(triton_relaunch.kernels())]
    for n in SIZES[:4]:
        host._step(f"clip_loss {n}x512")()
    host._step("siglip_loss 77x512")()
    warm.append(len(triton_relaunch.kernels()))
    print(
        json.dumps(
            {"warm": warm, "different": different, "launches": launches, "compiled": compiled, "seen": hooked(step)}
        )
    )


def hooked(step: Callable[[], Any]) -> int:
    """Launches of a step that a hook, as a profiler sets it, is told of."""
    runtime, seen = triton_relaunch._runtime(), list[Any]()
    before = runtime.launch_enter_hook
    if hasattr(before, "add"):
        before.add(seen.append)
        step()
        before.remove(seen.append)
    else:  # before Triton 3.5 there is one
        runtime.launch_enter_hook = seen.append
        step()
        runtime.launch_enter_hook = before
    return len(seen)


if __name__ == "__main__":
    with plans.disabled():  # replays.py has them
        main()
    leave()
