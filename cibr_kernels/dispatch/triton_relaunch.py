"""Launching again what Triton compiled: its own launch path asks what to compile on every launch, 40 to 110 us.

What a kernel is compiled for follows from the kernel, its constants and options, the device, and of each argument the
dtype, the alignment, or the number: that is the key.  A key that is new goes through Triton, which compiles, caches and
launches; one that is known passes its arguments to the compiled kernel.  Numbers are keys themselves, so two keys may
share a kernel and no key has two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

COMPARED = tuple((3, minor) for minor in range(2, 9))  # Tritons whose launcher's bytes were compared with these
MOST = 4096  # keys; a step has some 15, an epoch as many for each batch size
_known: dict[tuple[Any, ...], _Compiled] = {}


class _Compiled(NamedTuple):
    """A kernel of Triton's, and which of (tensors and numbers, constants) its launcher takes, in order."""

    kernel: Any  # keeps the code loaded
    run: Callable[..., None]
    arguments: Callable[[list[Any]], tuple[Any, ...]]


class Switch:
    """Whether something is done: yes, except inside `off`, and then in no thread."""

    on = True

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


_again = Switch()


def disabled() -> AbstractContextManager[None]:
    """Inside, every launch goes through Triton's own path.  For measuring, and for doubt; not thread-safe."""
    return _again.off()


def kernels() -> list[Any]:
    """The compiled kernels that are launched around Triton's path, each once."""
    return list({id(known.kernel): known.kernel for known in _known.values()}.values())


def clear() -> None:
    """Forgets every key; settings of Triton that changed since count from now on."""
    _known.clear()


def launch(
    kernel: Any, grid: tuple[int, ...], args: dict[str, Any], constants: dict[str, Any], options: dict[str, int],
    device: torch.device,
) -> Any:  # fmt: skip
    """kernel[grid](**args, **constants, **options) on `device`, which is the current one -> the compiled kernel."""
    if not (_again.on and is_compared()) or kernel.pre_run_hooks or watched():
        return kernel[grid](**args, **constants, **options)
    kinds, values = _kinds(args)
    key = (id(kernel), device.index, *args, *kinds, *constants, *constants.values(), *options.values())
    known = _known.get(key)
    if known is None:
        compiled = kernel[grid](**args, **constants, **options)
        if len(_known) >= MOST:
            _known.clear()
        _known[key] = _prepared(compiled, kernel, [*args, *constants])
        return compiled
    x, y, z = (*grid, 1, 1)[:3]
    compiled = known.kernel
    values += constants.values()
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    known.run(
        x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *known.arguments(values)
    )  # fmt: skip
    return compiled


def _kinds(args: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Of each argument what code depends on, and what a launcher takes."""
    kinds: list[Any] = []
    values: list[Any] = []
    for value in args.values():
        if isinstance(value, Tensor):
            address = value.data_ptr()
            kinds += (value.dtype, address % 16)
            values.append(address)
        elif value is None or isinstance(value, int):
            kinds.append(value)
            values.append(value)
        elif isinstance(value, float):
            kinds.append(float)
            values.append(value)
        else:  # a tensor descriptor: its blocks are the code's, its shape is passed
            kinds += (value.base.dtype, *value.block_shape)
            values.append(value)
    return kinds, values


def _prepared(compiled: Any, kernel: Any, names: list[str]) -> _Compiled:
    taken = kernel.arg_names if _version() > (3, 2) else [p.name for p in kernel.params if not p.is_constexpr]
    return _Compiled(compiled, compiled.run, itemgetter(*map(names.index, taken)))


def is_compared() -> bool:
    """Whether a compiled kernel of this Triton is known to be called as here."""
    return _version() in COMPARED


def not_compared() -> str:
    """In words, for the others."""
    compared = " ".join(f"{major}.{minor}" for major, minor in COMPARED)
    return f"the launches of Triton {'.'.join(map(str, _version()))} were not compared (those of {compared} were)"


@lru_cache
def _version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@lru_cache
def _runtime() -> Any:
    """Triton's settings of launches; before 3.4 they are the compiled kernels'."""
    try:
        from triton import knobs
    except ImportError:
        from triton.compiler import CompiledKernel

        return CompiledKernel
    return knobs.runtime


def watched() -> bool:
    """Whether somebody, such as a profiler of Triton's, wants to see launches."""
    runtime = _runtime()
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        (before is not None and getattr(before, "calls", True)) or (after is not None and getattr(after, "calls", True))
    )
