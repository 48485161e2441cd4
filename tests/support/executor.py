"""Executes this package's Triton launches on CPU tensors: each kernel is compiled for a target and its PTX emulated.

    with emulated(90) as e:
        out = some_op_triton.forward(x, ...)      # CPU tensors
    e.launches                                    # [(kernel name, grid), ...]

Kernels are specialised as Triton's run time would: pointers and integers divisible by 16, integers equal to 1, None.
Compiled kernels and parsed PTX are kept for the life of the process (Triton also caches on disk).  What the emulator
checks is in `emulator/__init__.py`; besides, a kernel may not read memory of a tensor made by `torch.empty` and its kin
inside the `with` before a kernel or PyTorch wrote it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import emulator
import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from cibr_kernels.dispatch import triton_call
from cibr_kernels.dispatch.triton_call import Grid, Named

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}
TARGETS = {  # capability: multiprocessors (few: grids that depend on them stay small), shared bytes of a block
    80: triton_call.Target("cuda", 80, 4, 166912),
    90: triton_call.Target("cuda", 90, 4, 232448),
    100: triton_call.Target("cuda", 100, 4, 232448),
    120: triton_call.Target("cuda", 120, 4, 101376),
}
MAKERS = ("empty", "empty_like", "empty_strided")
METHODS = ("new_empty", "new_empty_strided")
SHARED = {  # (kernel, argument): its blocks may read and write it without order
    (
        "dot_lse_fold_kernel",
        "mode",
    ),  # all write ONLINE; what a block left out the next launch writes again
}
GRID_LIMITS = (2**31 - 1, 65535, 65535)


def check_grid(kernel: str, grid: tuple[int, ...]) -> None:
    """Raises ValueError for a grid that CUDA does not launch."""
    if not all(0 < n <= limit for n, limit in zip(grid, GRID_LIMITS[: len(grid)], strict=True)):
        raise ValueError(f"CUDA refuses the grid {grid} of {kernel}")


@dataclass
class Emulator:
    """One emulated GPU.

    launches: (kernel name, grid) in order.  instructions: of all of them, per batch of blocks.  edit_ptx(kernel name,
    PTX) -> PTX plants a fault.  options go to emulator.Machine.
    """

    capability: int
    edit_ptx: Callable[[str, str], str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    launches: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    instructions: int = 0
    fresh: dict[int, tuple[Tensor, int, np.ndarray]] = field(default_factory=dict)  # storage: tensor, version, known

    def target(self, device: torch.device) -> triton_call.Target:
        return TARGETS[self.capability]

    def launch(self, kernel: Any, grid: Grid, args: Named, constants: Named, options: dict[str, int]) -> None:
        self.launches.append((kernel.__name__, grid))
        check_grid(kernel.__name__, grid)
        compiled, names = compile(kernel, self.capability, args, constants, options)
        ptx = compiled.asm["ptx"]
        code = _parsed(self.edit_ptx(kernel.__name__, ptx) if self.edit_ptx else ptx)
        memory: list[tuple[Any, np.ndarray | None]] = []
        shared: list[int] = []
        maps = list(getattr(compiled.metadata, "tensordesc_meta", None) or [])
        for name in names:
            shared += [len(memory)] if (kernel.__name__, name) in SHARED else []
            memory += self._passed(args[name], maps)
        if len(memory) < len(code.params):  # scratch that Triton allocates for the kernel, then for its profiler
            size = getattr(compiled.metadata, "global_scratch_size", 0) * int(np.prod(grid))
            memory.append((np.zeros(size, np.uint8) if size else 0, None))
        machine = emulator.launch(
            code,
            grid,
            (code.threads or 32 * options["num_warps"],),
            [m[0] for m in memory],
            [m[1] for m in memory],
            shared=shared,
            dynamic_shared=compiled.metadata.shared,
            **self.options,
            shared_limit=TARGETS[self.capability].shared_bytes,
        )
        self.instructions += machine.executed

    def _passed(self, value: Any, maps: list[dict[str, Any]]) -> list[tuple[Any, np.ndarray | None]]:
        """What Triton passes for one argument, with the bytes that are known; takes a descriptor from `maps`."""
        if isinstance(value, Tensor):
            return [self._memory(value)]
        if not isinstance(value, TensorDescriptor):
            return [(value, None)]
        tensor, shape, strides = value.base, list(value.shape), list(value.strides)
        assert value.padding == "zero" and not value.round_f32_to_tf32
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        data, known = self._memory(tensor.as_strided((extent,), (1,)))
        if maps:
            meta = maps.pop(0)
            size = meta["elem_size"]
            fields = {
                "global_address": data,
                "elemtype": meta["elem_type"],
                "rank": len(shape) - 1,
                "swizzle_mode": meta["swizzle"],
                "box_dim": dict(enumerate(reversed(meta["block_size"]))),
                "global_dim": dict(enumerate(reversed(shape))),
                "global_stride": dict(enumerate(size * s for s in reversed(strides[:-1]))),
            }
            first = [(fields, known)]
        else:  # no TMA unit: pointer, shape, strides, NaN padding?, rounding?
            first = [(data, known), *((v, None) for v in (*shape, *strides, 0, 0))]
        return [*first, *((v, None) for v in (*shape, *strides))]

    def made(self, tensor: Any) -> Any:
        """Notes that nothing was written to this tensor yet."""
        if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.numel() and not tensor.is_inference():
            storage = tensor.untyped_storage()
            self.fresh[storage.data_ptr()] = (tensor.detach(), tensor._version, np.zeros(storage.nbytes(), np.bool_))
        return tensor

    def _memory(self, tensor: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """The tensor's bytes (shared with it) and which of them are known, None for all."""
        extent = (
            1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        )
        flat = tensor.detach().as_strided((extent,), (1,))
        raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        key = tensor.untyped_storage().data_ptr()
        made, version, known = self.fresh.get(key, (None, 0, None))
        if made is not None and made._version != version:  # PyTorch wrote to it
            del self.fresh[key]
            known = None
        if known is not None:
            start = tensor.storage_offset() * tensor.element_size()
            known = known[start : start + extent * tensor.element_size()]
        return flat.view(raw).numpy(), known


_compiled: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
_parsed = lru_cache(maxsize=512)(emulator.Kernel)


def compile(
    kernel: Any, capability: int, args: dict[str, Any], constants: dict[str, Any], options: dict[str, int]
) -> tuple[Any, list[str]]:
    """The kernel as Triton's run time would specialise it for these arguments, and its arguments that remain."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    constants = dict(constants)
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value, parameter = args[name], kernel.params[i]
        specialise = not parameter.do_not_specialize
        divisible = False
        if isinstance(value, Tensor):
            signature[name], divisible = "*" + TYPES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif value is None or (value is not True and value == 1 and isinstance(value, int) and specialise):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, (bool, float)):
            signature[name] = "fp32" if isinstance(value, float) else "u1"
        else:
            signature[name], divisible = ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
        if divisible and specialise and not parameter.do_not_specialize_on_alignment:
            attributes[(i,)] = [["tt.divisibility", 16]]
    names = [name for name in kernel.arg_names if signature[name] != "constexpr"]
    key = (capability, tuple(signature.items()), repr(constants), tuple(attributes), tuple(sorted(options.items())))
    known = _compiled.setdefault(kernel, {})
    if key not in known:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        with _not_assembled():
            known[key] = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    return known[key], names


@contextmanager
def _not_assembled() -> Iterator[None]:
    """Inside, Triton (since 3.5) stops at PTX: ptxas would take a seventh of the time, for code that nobody reads here.

    static_table.py assembles every kernel that ships.
    """

    def hook(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str] | None:
        if stages is None:  # Triton asks for a part of its cache's key and a hash
            return "not assembled", "not assembled"
        stages["cubin"] = lambda ptx, metadata: b""
        return None

    runtime = getattr(getattr(triton, "knobs", None), "runtime", None)
    if not hasattr(runtime, "add_stages_inspection_hook"):
        yield
        return
    before, runtime.add_stages_inspection_hook = runtime.add_stages_inspection_hook, hook
    try:
        yield
    finally:
        runtime.add_stages_inspection_hook = before


@contextmanager
def emulated(
    capability: int, *, edit_ptx: Callable[[str, str], str] | None = None, **options: Any
) -> Iterator[Emulator]:
    """Inside, `backend="triton"` runs CPU tensors on an emulated GPU of this compute capability."""
    found = Emulator(capability, edit_ptx, options)
    with triton_call.execute_on(found), _makers(found):
        yield found


@contextmanager
def _makers(found: Emulator) -> Iterator[None]:
    """torch.empty and its kin tell `found` what they made."""

    def telling(f: Any) -> Any:
        return lambda *args, **kwargs: found.made(f(*args, **kwargs))

    functions = {name: getattr(torch, name) for name in MAKERS}
    try:
        for name, f in functions.items():
            setattr(torch, name, telling(f))
        for name in METHODS:
            setattr(Tensor, name, telling(getattr(Tensor, name)))
        yield
    finally:
        for name, f in functions.items():
            setattr(torch, name, f)
        for name in METHODS:
            delattr(Tensor, name)


def strips_of(monkeypatch: Any) -> list[tuple[str, Any, int]]:
    """-> a list that grows by (kernel, grid, strips) with every launch of a kernel that has strips of tiles."""
    found: list[tuple[str, Any, int]] = []
    launch = triton_call.launch

    def keep(kernel: Any, grid: Any, args: Any, constants: Any, **options: Any) -> None:
        if constants.get("STRIPS"):
            found.append((kernel.__name__, grid, args["strips"]))
        launch(kernel, grid, args, constants, **options)

    monkeypatch.setattr(triton_call, "launch", keep)
    return found


def assert_tensor_cores(run: Callable[[], Any], kernels: tuple[str, ...]) -> None:
    """Compiled for what it should be: warp-group and fifth-generation instructions, fed by the TMA unit."""
    expected = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
    for capability, instruction in expected.items():
        code: dict[str, str] = {}

        def keep(name: str, ptx: str, code: dict[str, str] = code) -> str:
            code[name] = ptx
            return ptx

        with emulated(capability, edit_ptx=keep):
            run()
        for name in kernels:
            assert instruction in code[name], (capability, name)
            assert ("cp.async.bulk.tensor" in code[name]) == (capability >= 90), (capability, name)
