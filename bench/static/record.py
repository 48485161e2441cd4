"""What a launcher would do on a GPU, without one and without memory: launches, vendor GEMMs and other PyTorch kernels.

The launcher's own code runs on fake CUDA tensors (shapes, no storage), so a batch of 131072 costs nothing.
`triton_call` hands launches to `Recorder`; PyTorch's own kernels are seen by a dispatch mode; this package's registered
operators are opened, not recorded.  Kernels that a peer launches itself (`kernel[grid](...)`) are caught at Triton's
`JITFunction.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.static.gpus import AMD, GPUS
from cibr_kernels.dispatch import library, plans, triton_call
from cibr_kernels.dispatch.triton_call import Grid, Named
from cibr_kernels.nn import ConcatCritic

NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
GEMMS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "matmul")  # matmul: with out= it is not taken apart
PICKS = ("nll_loss_forward", "index", "gather", "index_select")  # read as many elements as they write
ALLOCATES = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


@dataclass(frozen=True)
class Argument:
    """What Triton specialises a kernel on: a type such as "*bf16" or "i32", divisibility by 16, a number's value."""

    type: str
    aligned: bool
    value: float | int | None = None
    bytes: int = 0  # of a tensor


@dataclass(frozen=True)
class Launch:
    """One Triton kernel over a grid."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Argument]
    constants: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def programs(self) -> int:
        product = 1
        for size in self.grid:
            product *= size
        return product

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that one compilation serves."""
        free = {p.name for p in self.kernel.params if p.do_not_specialize}
        types = tuple((n, a.type, n not in free and (a.aligned, a.value == 1)) for n, a in self.args.items())
        constants = tuple(sorted((n, str(c)) for n, c in self.constants.items()))
        return self.name, types, constants, tuple(sorted(self.options.items()))


@dataclass(frozen=True)
class Gemm:
    """One matrix product of the vendor's library: batch x (m, k) x (k, n)."""

    m: int
    n: int
    k: int
    batch: int
    dtype: str
    bytes: int  # each operand read once, the result written once (and read, where it accumulates)

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True)
class Other:
    """Any other PyTorch kernel: its operands read and its results written."""

    name: str
    bytes: int


Event = Launch | Gemm | Other


@dataclass
class Recorder:
    """The executor that `triton_call` launches on.  `events` are in the order of the launches."""

    machine: int | str  # a compute capability or an AMD architecture
    events: list[Event] = field(default_factory=list)

    def target(self, device: torch.device) -> triton_call.Target:
        if isinstance(self.machine, str):
            return triton_call.Target("hip", 0, AMD[self.machine].processors, AMD[self.machine].shared_block)
        gpu = GPUS[self.machine]
        return triton_call.Target("cuda", gpu.capability, gpu.processors, gpu.shared_block)

    def launch(self, kernel: Any, grid: Grid, args: Named, constants: Named, options: dict[str, int]) -> None:
        described = {name: describe(value) for name, value in args.items() if value is not None}
        absent = {name: None for name, value in args.items() if value is None}
        self.events.append(Launch(kernel, tuple(map(int, grid)), described, {**constants, **absent}, dict(options)))


def describe(value: Any) -> Argument:
    """A kernel's argument as Triton would specialise it on a GPU, where fresh memory is aligned to 16 bytes."""
    if hasattr(value, "block_shape"):  # a tensor descriptor made by the host
        kind = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
        return Argument(kind, False, bytes=_bytes([value.base]))
    if isinstance(value, Tensor):
        aligned = int(value.storage_offset()) * value.itemsize % 16 == 0
        return Argument("*" + NAMES[value.dtype], aligned, bytes=_bytes([value]))
    if isinstance(value, bool):
        return Argument("i1", False, int(value))
    if isinstance(value, int):
        return Argument("i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0, value)
    return Argument("fp32", False, float(value))


class _Watch(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "cibr_kernels":
            definition = torch._library.custom_ops.OPDEFS[func.name().partition(".")[0]]
            with self:
                return definition._init_fn(*args, **kwargs)
        # PyTorch 2.11 cannot add to float32 on fake tensors (addmm.dtype_out): what was to be written is the result
        result = kwargs["out"] if func._overloadname == "dtype_out" else func(*args, **kwargs)
        if func.namespace == "aten" and not _is_free(func, args, result):
            event = _event(func.overloadpacket.__name__, args, kwargs, result)
            if event is not None:
                self.recorder.events.append(event)
        return result


def _is_free(func: Any, args: Any, result: Any) -> bool:
    """Whether an operator launches nothing: it allocates, looks at a tensor differently, or answers a question."""
    made = _tensors(result)
    if not made or func.overloadpacket.__name__ in ALLOCATES:
        return True
    if func._schema.is_mutable:
        return False
    held = {id(t) for t in _tensors(args)} | {t.untyped_storage()._cdata for t in _tensors(args)}
    return all(id(t) in held or t.untyped_storage()._cdata in held for t in made)


def _event(name: str, args: Any, kwargs: dict[str, Any], result: Any) -> Event | None:
    reads, writes = _tensors((args, {k: v for k, v in kwargs.items() if k != "out"})), _tensors(result)
    if not any(t.device.type == "cuda" for t in (*reads, *writes)):
        return None
    operands = [t for t in args if isinstance(t, Tensor)][-2:]
    if name.rstrip("_") in GEMMS and min(t.dim() for t in operands) >= 2:
        a, b = operands
        (m, k), n, batch = a.shape[-2:], b.shape[-1], a.shape[0] if a.dim() == 3 else 1
        # an accumulator is among the operands: counted as read here, as written below
        return Gemm(m, n, k, batch, str(a.dtype).removeprefix("torch."), _bytes(reads) + _bytes(writes))
    if name in PICKS:
        return Other(name, 2 * _bytes(writes))
    if name == "nll_loss_backward":  # writes zeros and one element a row
        return Other(name, _bytes(writes))
    return Other(name, _bytes(reads) + _bytes(writes))


def _tensors(tree: Any) -> list[Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


@contextmanager
def recording(machine: int | str) -> Iterator[Recorder]:
    """Inside, tensors made on "cuda" are fake and every launch is recorded as on this GPU.

    `machine` is a compute capability of GPUS or an architecture of AMD.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    recorder = Recorder(machine)
    gpu = AMD[machine] if isinstance(machine, str) else GPUS[machine]
    major, minor = (9, 4) if isinstance(machine, str) else divmod(machine, 10)
    properties = mock.Mock(
        major=major,
        minor=minor,
        multi_processor_count=gpu.processors,
        shared_memory_per_block_optin=gpu.shared_block,
        shared_memory_per_multiprocessor=233472,
        shared_memory_per_block=49152,
        warp_size=32,
        total_memory=80 * 10**9,
    )
    properties.name = gpu.name
    patches = {
        "get_device_capability": lambda *_: (major, minor),
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: gpu.name,
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: False,
    }
    direct: dict[tuple[Any, str], Callable[..., Any]] = {  # what users launch; the watch and fake tensors forbid it
        (library, "only_autograd_looks_on"): lambda *_: True,
        (ConcatCritic, "plain_weights"): _weights,
        (plans, "find"): lambda *_: None,
        (plans, "run"): lambda key, direction, inputs: direction(*inputs),
        (plans, "run_after"): lambda first, key, direction, inputs, new: direction(*inputs),
    }
    fake = FakeTensorMode()  # before the patches: it looks for a driver where CUDA is said to be available
    with ExitStack() as stack:
        for name, function in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        for (owner, name), function in direct.items():
            stack.enter_context(mock.patch.object(owner, name, function))
        stack.enter_context(_catch_direct_launches(recorder))
        stack.enter_context(triton_call.execute_on(recorder))
        stack.enter_context(fake)
        stack.enter_context(_Watch(recorder))
        yield recorder


def _weights(critic: Any) -> tuple[Tensor, ...]:
    """`ConcatCritic.plain_weights` of fake parameters."""
    return critic.x_proj.weight, critic.z_proj.weight, critic.z_proj.bias, critic.out.weight, critic.out.bias


@contextmanager
def _catch_direct_launches(recorder: Recorder) -> Iterator[None]:
    """`kernel[grid](...)` of any Triton kernel goes to the recorder; an autotuner's every configuration is offered."""
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
        values = dict(zip(kernel.arg_names, args, strict=False))
        values |= {k: v for k, v in kwargs.items() if k in kernel.arg_names}
        for parameter in kernel.params:
            if parameter.name not in values and parameter.has_default:
                values[parameter.name] = parameter.default
        constexpr = {p.name for p in kernel.params if p.is_constexpr}
        sizes = grid(values) if callable(grid) else grid
        numbers = {k: v for k, v in options.items() if k in ("num_warps", "num_stages", "num_ctas") and v is not None}
        recorder.launch(
            kernel,
            tuple(sizes),
            {k: v for k, v in values.items() if k not in constexpr},
            {k: v for k, v in values.items() if k in constexpr},
            {"num_warps": 4, "num_stages": 3, **numbers},
        )

    with mock.patch.object(JITFunction, "run", run):
        yield


def backward(loss: Tensor) -> None:
    """Runs the backward of a fake loss.  PyTorch's engine asks the driver for streams, so the graph is walked here."""
    grads: dict[Any, list[Tensor | None]] = {}

    def deliver(node: Any, index: int, grad: Tensor | None) -> None:
        slots = grads.setdefault(node, [])
        slots += [None] * (len(node._input_metadata) - len(slots))
        held = slots[index]
        metadata = node._input_metadata[index]  # the engine sums what was broadcast, and casts
        if grad is not None and tuple(grad.shape) != tuple(metadata.shape):
            grad = grad.sum_to_size(metadata.shape)
        if grad is not None and grad.dtype != metadata.dtype:
            grad = grad.to(metadata.dtype)
        slots[index] = grad if held is None else held if grad is None else held + grad

    deliver(loss.grad_fn, loss.output_nr, torch.ones_like(loss))
    for node in _order(loss.grad_fn):
        slots = grads.pop(node, [])
        if type(node).__name__ == "AccumulateGrad" or not any(g is not None for g in slots):
            continue
        call: Callable[..., Any] = getattr(node, "apply", node)
        with torch.no_grad():
            results = call(*slots)
        results = results if isinstance(results, tuple) else (results,)
        parents = node.next_functions
        if hasattr(node, "needs_input_grad"):  # a function in Python has results for what is no tensor, too
            parents = [parent for parent in parents if parent[0] is not None]
            results = [grad for grad, need in zip(results, node.needs_input_grad, strict=True) if need]
        for (parent, index), grad in zip(parents, results, strict=False):
            if parent is not None:
                deliver(parent, index, grad)


def _order(root: Any) -> list[Any]:
    """Nodes of the graph, every one before those it sends gradients to."""
    done: list[Any] = []
    seen: set[Any] = set()
    todo: list[tuple[Any, bool]] = [(root, False)]
    while todo:
        node, leaving = todo.pop()
        if leaving:
            done.append(node)
        elif node not in seen:
            seen.add(node)
            todo.append((node, True))
            todo += [(parent, False) for parent, _ in node.next_functions if parent is not None and parent not in seen]
    return done[::-1]
