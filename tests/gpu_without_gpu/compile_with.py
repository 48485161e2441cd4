"""Compiles every Triton kernel by the run time of whichever Triton this process has; prints one line a kernel.

    PYTHONPATH=<folder of a Triton>:.:tests/support python tests/gpu_without_gpu/compile_with.py 80 90

Each capability's kernels are those that the launchers ask for there, through `kernel.warmup`: what a launch on such a
GPU does before it runs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from static_table import launches
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.static.record import NAMES, Argument, Launch

DTYPES = {f"*{name}": dtype for dtype, name in NAMES.items()}


class Driver:
    """Stands for the driver of a GPU that is not here."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class Pointer:
    """A tensor as Triton's run time asks for it."""

    def __init__(self, dtype: torch.dtype, aligned: bool) -> None:
        self.dtype, self.address = dtype, 256 if aligned else 4

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return 0


def argument(a: Argument) -> Any:
    return a.value if a.value is not None else Pointer(DTYPES[a.type], a.aligned)


def compile_launch(launch: Launch) -> Any:
    arguments = {name: argument(a) for name, a in launch.args.items()}
    return launch.kernel.warmup(**arguments, **launch.constants, **launch.options, grid=(1,))


def main(capabilities: list[int]) -> None:
    print("triton", triton.__version__)
    for capability in capabilities:
        driver.set_active(Driver(capability))
        for name, launch in launches(capability):
            kernel = compile_launch(launch)
            print(f"sm_{capability} {name}: {kernel.metadata.shared} bytes of shared memory", flush=True)


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]])
