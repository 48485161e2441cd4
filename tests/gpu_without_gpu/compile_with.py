"""Compiles every Triton kernel by the run time of the oldest Triton that the package takes; prints the rows as JSON.

    pip install --no-deps --target OLD triton==3.2.0
    PYTHONPATH=OLD:.:tests/support python tests/gpu_without_gpu/compile_with.py            the rows
    PYTHONPATH=OLD:.:tests/support python tests/gpu_without_gpu/compile_with.py --update   writes oldest_triton.json

Each capability's kernels are those that the launchers ask for there, through `kernel.warmup`: what a launch on such a
GPU does before it runs.  As in static_table.json, rows of the same key are taken from the table, but one in CHECKED.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import static_table
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.static import sass
from bench.static.record import NAMES, Argument, Launch

TABLE = Path(__file__).with_name("oldest_triton.json")
CAPABILITIES = (80, 90)  # it knows none above
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


def launch_row(name: str, launch: Launch) -> dict[str, static_table.Facts]:
    """shared: bytes of a block."""
    return {name: {"shared": compile_launch(launch).metadata.shared}}


@lru_cache
def compilers() -> tuple[str, ...]:
    """What, besides a launch, decides its row."""
    parts = (Driver, Pointer, argument, compile_launch, launch_row)
    code = [ast.unparse(ast.parse(inspect.getsource(part))) for part in parts]
    return triton.__version__, sass.run(sass.tool("ptxas"), "--version"), *code


def launch_key(launch: Launch, capability: int) -> list[str]:
    """Triton's hash of the kernel and of what it calls, and how the launch specialises it."""
    functions = [getattr(constant, "cache_key", "") for constant in launch.constants.values()]
    return [launch.kernel.cache_key, *functions, json.dumps(launch.key), str(capability), *compilers()]


def rows(table: dict[str, static_table.Facts]) -> dict[str, static_table.Facts]:
    found: dict[str, static_table.Facts] = {}
    for capability in CAPABILITIES:
        driver.set_active(Driver(capability))
        for name, launch in static_table.launches(capability):
            row = f"sm_{capability} {name}"
            key = launch_key(launch, capability)
            found |= static_table.settled([row], key, table, partial(launch_row, row, launch))
    return found


def main() -> None:
    old = static_table.load(TABLE)
    new = {"versions": {"triton": triton.__version__}, "kernels": rows(old["kernels"])}
    if "--update" in sys.argv[1:]:
        static_table.save(new, TABLE)
    print(json.dumps(new))


if __name__ == "__main__":
    main()
