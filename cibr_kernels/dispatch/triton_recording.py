"""What a direction of an op does on a GPU, written down while it runs: launches, matmuls, and where memory came from.

    with Recorder(inputs) as seen:
        outputs = direction(*inputs)
    seen.refusal or seen.commands

A launch comes from `triton_call` or `cuda_call`, everything else from PyTorch's dispatcher: allocations, views, and the
matmuls that cuBLAS runs are understood; whatever else happens is the reason why it cannot be replayed.
"""

from __future__ import annotations

import itertools
import re
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
FACTORIES = {
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip
ADDS = {aten.addmm.out, *(() if not hasattr(aten.addmm, "dtype_out") else (aten.addmm.dtype_out,))}
MULTIPLIES = {aten.mm.out, *(() if not hasattr(aten.mm, "dtype_out") else (aten.mm.dtype_out,))}
FORMATS = {"i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}  # of struct, by Triton's types
PARAMETER = re.compile(r"\.param\s")
MOST_SHARED = 228 * 1024  # beyond, Triton's launcher asks for more in an attribute
_local = threading.local()


class Unknown(Exception):
    """This cannot be replayed; the message says why."""


@dataclass(frozen=True)
class Pointer:
    """An address that a launch passes."""

    storage: int  # an input's number, or what Recorder.storages has
    offset: int  # bytes


@dataclass(frozen=True)
class Map:
    """A tensor map that a launch passes: innermost dimension first, strides in bytes from the second on."""

    at: Pointer
    dtype: int  # CUtensorMapDataType
    element_bytes: int
    swizzle: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and parameters: numbers as they lie in memory, None for a null pointer."""

    compiled: Any  # Triton's CompiledKernel: keeps the code loaded
    grid: tuple[int, int, int]
    parameters: tuple[bytes | Pointer | Map | None, ...]

    @property
    def places(self) -> list[Pointer]:
        return [p.at if isinstance(p, Map) else p for p in self.parameters if isinstance(p, (Pointer, Map))]


@dataclass(frozen=True)
class Matrix:
    """A (rows, cols) matrix: rows are pitch numbers apart, or where transposed its columns are."""

    at: Pointer
    rows: int
    cols: int
    pitch: int
    transposed: bool
    dtype: torch.dtype

    @property
    def strides(self) -> tuple[int, int]:
        return (1, self.pitch) if self.transposed else (self.pitch, 1)


@dataclass(frozen=True)
class Gemm:
    """out = alpha a b, or out += alpha a b, in float32."""

    a: Matrix
    b: Matrix
    out: Matrix
    accumulate: bool
    alpha: float = 1.0

    @property
    def places(self) -> list[Pointer]:
        return [self.a.at, self.b.at, self.out.at]


@dataclass(frozen=True)
class Call:
    """A call of a CUDA C++ kernel: `cuda_call` fills its parameter struct with numbers and addresses."""

    kernel: str
    struct: str
    numbers: dict[str, Any]
    pointers: dict[str, Pointer]

    @property
    def places(self) -> list[Pointer]:
        return list(self.pointers.values())


@dataclass
class Storage:
    """Memory that was allocated while recording."""

    nbytes: int


def active() -> Recorder | None:
    """The recorder of this thread, if it records."""
    return getattr(_local, "recorder", None)


class Recorder(TorchDispatchMode):
    """Commands in order, in terms of storages: inputs are 0 ... len(inputs) - 1, allocations follow."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.commands: list[Launch | Gemm | Call] = []
        self.refusal: str | None = None
        self.storages: dict[int, Storage] = {}
        self.inputs = [(t.data_ptr(), t.nbytes) for t in inputs]
        self.kinds = [(tuple(t.shape), t.dtype) for t in inputs]
        self._at: dict[int, int] = {}  # of an allocation's first address, the storage that lies there now

    def __enter__(self) -> Recorder:
        _local.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        _local.recorder = None
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.refusal is None:
            try:
                self._note(func, args, kwargs, result)
            except Unknown as reason:
                self.refusal = str(reason)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func in FACTORIES:
            storage = result.untyped_storage()
            number = len(self.inputs) + len(self.storages)
            self.storages[number] = Storage(storage.nbytes())
            self._at[storage.data_ptr()] = number
        elif func in MULTIPLIES:
            self.commands.append(Gemm(self._matrix(args[0]), self._matrix(args[1]), self._matrix(kwargs["out"]), False))
        elif func in ADDS:
            out = kwargs["out"]
            if args[0].data_ptr() != out.data_ptr() or args[0].shape != out.shape:
                raise Unknown("a matmul that is added to something else")
            beta, alpha = kwargs.get("beta", 1), float(kwargs.get("alpha", 1))
            if beta not in (0, 1):
                raise Unknown("a matmul that is added to a multiple of its output")
            operands = self._matrix(args[1]), self._matrix(args[2]), self._matrix(out)
            self.commands.append(Gemm(*operands, beta == 1, alpha))
        elif not _is_view(func) and not (func is aten.zero_.default and args[0].numel() == 0):
            raise Unknown(f"{func} is neither a launch of Triton's nor a matmul")

    def launched(self, compiled: Any, grid: tuple[int, ...], kernel: Any, values: dict[str, Any]) -> None:
        """A launch that has been made: `values` are all its arguments, by name."""
        if self.refusal is None and all(grid):
            try:
                x, y, z = (*grid, 1, 1)[:3]
                self.commands.append(Launch(compiled, (x, y, z), self._parameters(compiled, kernel, values)))
            except Unknown as reason:
                self.refusal = f"{kernel.__name__}: {reason}"

    def called(self, kernel: str, struct: str, fields: dict[str, Any]) -> None:
        """A call of a CUDA C++ kernel that has been made, its workspace among the fields."""
        if self.refusal is not None:
            return
        try:
            tensors = {name: self.place(t) for name, t in fields.items() if isinstance(t, Tensor) and t.numel()}
            numbers = {name: v for name, v in fields.items() if v is not None and not isinstance(v, Tensor)}
            self.commands.append(Call(kernel, struct, numbers, tensors))
        except Unknown as reason:
            self.refusal = f"{kernel}: {reason}"

    def place(self, t: Tensor) -> Pointer:
        """Where t starts.  Raises Unknown for memory that is neither an input's nor allocated meanwhile."""
        address, size = t.data_ptr(), max(t.nbytes, 1)
        for number, (start, length) in enumerate(self.inputs):
            if start <= address and address + size <= start + length:
                return Pointer(number, address - start)
        start = t.untyped_storage().data_ptr()
        if start not in self._at:
            raise Unknown("memory that is neither an input nor allocated here")
        return Pointer(self._at[start], address - start)

    def _matrix(self, t: Tensor) -> Matrix:
        rows, cols = t.shape
        if t.stride(1) == 1 and t.stride(0) >= cols:
            return Matrix(self.place(t), rows, cols, t.stride(0), False, t.dtype)
        if t.stride(0) == 1 and t.stride(1) >= rows:
            return Matrix(self.place(t), rows, cols, t.stride(1), True, t.dtype)
        raise Unknown(f"a matmul of strides {t.stride()}")

    def _parameters(self, compiled: Any, kernel: Any, values: dict[str, Any]) -> tuple[Any, ...]:
        """What Triton's launcher passes, in order; past the kernel's own, null pointers to scratch memory."""
        meta = compiled.metadata
        _check_plain(meta)
        signature = compiled.src.signature
        maps = list(getattr(meta, "tensordesc_meta", None) or ())
        found: list[Any] = []
        for name in kernel.arg_names:
            kind, value = signature.get(name, "constexpr"), values[name]
            if kind == "constexpr" or name in (compiled.src.constants or ()):
                continue
            if kind.startswith("*"):
                found.append(None if value is None or value.data_ptr() == 0 else self.place(value))
            elif kind.startswith("tensordesc"):
                found += self._descriptor(value, maps)
            elif kind in FORMATS:
                found.append(struct.pack(FORMATS[kind], value))
            else:
                raise Unknown(f"a parameter of type {kind}")
        entry = re.search(r"\.entry[^{]*", compiled.asm["ptx"])
        scratch = (len(PARAMETER.findall(entry[0])) if entry else 0) - len(found)
        if not 0 <= scratch <= 2:
            raise Unknown(f"its code has {len(found) + scratch} parameters, its signature {len(found)}")
        return *found, *(None,) * scratch

    def _descriptor(self, value: Any, maps: list[dict[str, Any]]) -> list[Any]:
        """A tensor map and, as numbers, shape and strides."""
        if not maps or getattr(value, "padding", "zero") != "zero" or getattr(value, "round_f32_to_tf32", False):
            raise Unknown("a tensor descriptor that is not a plain tensor map")
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        meta = maps.pop(0)
        if meta.get("fp4_padded") or meta.get("is_im2col"):
            raise Unknown("a tensor descriptor that is not a plain tensor map")
        size, strides = meta["elem_size"], [int(s) for s in value.strides]
        found = Map(
            self.place(value.base), TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], size, meta["swizzle"],
            tuple(map(int, reversed(value.shape))), tuple(size * s for s in reversed(strides[:-1])),
            tuple(reversed(meta["block_size"])),
        )  # fmt: skip
        return [found, *(struct.pack("i", s) for s in value.shape), *(struct.pack("q", s) for s in strides)]


def _check_plain(meta: Any) -> None:
    """Raises Unknown for launches with attributes: clusters, scratch memory, cooperative or dependent launches."""
    clusters = getattr(meta, "num_ctas", 1) != 1 or any(d != 1 for d in getattr(meta, "cluster_dims", None) or ())
    options = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    asked = [name for name in options if getattr(meta, name, 0)]
    if clusters or asked or meta.shared > MOST_SHARED or getattr(meta, "instrumentation_mode", ""):
        raise Unknown(f"a launch with attributes: {'clusters' if clusters else asked or meta.shared}")


def overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether two of them share memory."""
    ordered = sorted((t.data_ptr(), t.nbytes) for t in tensors)
    return any(a + size > b for (a, size), (b, _) in itertools.pairwise(ordered))


def _is_view(func: Any) -> bool:
    """Whether all that an operator returns is a view of what it is given, unwritten."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
