"""Of what was recorded, a plan: slots for the tensors of a call, one block of memory for those that come and go.

    slots     inputs, outputs, then two workspaces
    phases    what is allocated, run and let go, in turn: one; or two where outputs can take the memory of a large
              temporary, so that a replayed step has the peak of a recorded one

Addresses are arguments: nothing that a plan keeps points into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cibr_kernels.dispatch import cuda_call
from cibr_kernels.dispatch.triton_recording import Call, Gemm, Launch, Map, Matrix, Pointer, Recorder, Unknown

ALIGNMENT = 512  # of a temporary in its workspace: that of PyTorch's allocator
LARGE = 4 << 20  # bytes of a temporary whose memory outputs may take
CUDA_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType


class Place(NamedTuple):
    """Of a storage, or in one."""

    slot: int
    offset: int  # bytes


# run(device, stream, cuBLAS's handle, addresses by slot)
Step = Callable[[int, int, int, list[int]], None]


class Room(NamedTuple):
    """An output: torch.empty(shape, dtype), or torch.empty_like an input, which takes less time."""

    slot: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    like: int  # an input's slot, or -1


class Workspace(NamedTuple):
    """Memory of a call that no tensor owns: a tensor takes three times the host's time."""

    slot: int
    size: int  # bytes


@dataclass
class Phase:
    """Allocations, then what runs, then the slots of the workspaces that are let go."""

    rooms: list[Room] = field(default_factory=list)
    workspaces: list[Workspace] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    let_go: list[int] = field(default_factory=list)


class Plan:
    """`run(inputs)` does what the recorded direction did, on other tensors of the same shapes and alignments."""

    def __init__(self, seen: Recorder, outputs: Sequence[Tensor], device: torch.device, native: Any) -> None:
        """native: the module _plans.  Raises Unknown where an output is no tensor of its own."""
        self.device, self.index = device, device.index
        self.last_use, self.kept = 0, True
        self.after: dict[Any, Plan] = {}  # of directions that follow this one: `plans.run_after`
        self.settings: Any = None  # PyTorch's, that its matmuls depend on
        self.kernels = [command.compiled for command in seen.commands if isinstance(command, Launch)]
        self.multiplies = any(isinstance(command, Gemm) for command in seen.commands)
        rooms, at = _output_rooms(seen, outputs)
        self._outputs = [room.slot for room in rooms]
        self._slots = len(seen.inputs) + len(rooms) + 2
        spans = _spans(seen, at)
        split = _split(seen, at, spans, rooms)
        workspaces = _workspaces(spans, split, self._slots - 2, at)
        self.phases = [Phase(), Phase()] if split < len(seen.commands) else [Phase()]
        first_use = _first_uses(seen, at)
        for room in rooms:
            late = len(self.phases) == 2 and first_use.get(room.slot, 0) >= split
            self.phases[late].rooms.append(room)
        self.phases[0].workspaces = [room for room in workspaces if room.size]
        self.phases[0].let_go = [room.slot for room in self.phases[0].workspaces if room is workspaces[0]]
        for phase, part in zip(self.phases, (seen.commands[:split], seen.commands[split:]), strict=False):
            phase.steps = _steps(part, at, self._slots, native, device)
        self._phases = [(phase.rooms, phase.workspaces, phase.steps, phase.let_go) for phase in self.phases]
        self._zeros = [0] * (self._slots - len(seen.inputs))

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """On the current stream of the plan's device, which is the current device."""
        device, index = self.device, self.index
        handle = torch._C._cuda_getCurrentBlasHandle() if self.multiplies else 0
        stream = torch._C._cuda_getCurrentRawStream(index)
        addresses = [t.data_ptr() for t in inputs] + self._zeros
        made: dict[int, Tensor] = {}
        held: list[int] = []
        try:
            for rooms, workspaces, steps, let_go in self._phases:
                for slot, shape, dtype, like in rooms:
                    t = torch.empty(shape, dtype=dtype, device=device) if like < 0 else torch.empty_like(inputs[like])
                    made[slot] = t
                    addresses[slot] = t.data_ptr()
                for slot, size in workspaces:
                    addresses[slot] = torch._C._cuda_cudaCachingAllocator_raw_alloc(size, stream)
                    held.append(slot)
                for step in steps:
                    step(index, stream, handle, addresses)
                for slot in let_go:
                    held.remove(slot)
                    torch._C._cuda_cudaCachingAllocator_raw_delete(addresses[slot])
        finally:
            for slot in held:
                torch._C._cuda_cudaCachingAllocator_raw_delete(addresses[slot])
        return tuple([made[slot] for slot in self._outputs])


def _output_rooms(seen: Recorder, outputs: Sequence[Tensor]) -> tuple[list[Room], dict[int, Place]]:
    """-> an allocation for each output, in order; where storages of inputs and outputs lie."""
    at = {number: Place(number, 0) for number in range(len(seen.inputs))}
    rooms: list[Room] = []
    for slot, t in enumerate(outputs, len(seen.inputs)):
        kind = tuple(t.shape), t.dtype
        rooms.append(Room(slot, *kind, seen.kinds.index(kind) if kind in seen.kinds else -1))
        if t.numel():
            place, whole = seen.place(t), t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes
            if place.storage in at or place.offset or not whole:
                raise Unknown("an output that is no tensor of its own")
            at[place.storage] = Place(slot, 0)
    return rooms, at


class _Span(NamedTuple):
    """The first and the last command that know a temporary."""

    first: int
    last: int
    nbytes: int


def _spans(seen: Recorder, at: dict[int, Place]) -> dict[int, _Span]:
    """Of each temporary."""
    spans: dict[int, _Span] = {}
    for i, command in enumerate(seen.commands):
        for number in {place.storage for place in command.places} - at.keys():
            first = spans[number].first if number in spans else i
            spans[number] = _Span(first, i, seen.storages[number].nbytes)
    return spans


def _first_uses(seen: Recorder, at: dict[int, Place]) -> dict[int, int]:
    """Of each slot of an input or output, the first command that knows it."""
    found: dict[int, int] = {}
    for i, command in enumerate(seen.commands):
        for place in command.places:
            if place.storage in at:
                found.setdefault(at[place.storage].slot, i)
    return found


def _split(seen: Recorder, at: dict[int, Place], spans: dict[int, _Span], rooms: list[Room]) -> int:
    """The command from which on outputs have a large temporary's memory; the number of commands where none does."""
    end, first_use = len(seen.commands), _first_uses(seen, at)
    largest = max(spans.values(), key=lambda span: span.nbytes, default=_Span(0, end, 0))
    late = any(first_use.get(room.slot, 0) > largest.last for room in rooms)
    return largest.last + 1 if late and largest.nbytes >= LARGE else end


def _workspaces(spans: dict[int, _Span], split: int, first_slot: int, at: dict[int, Place]) -> list[Workspace]:
    """-> the workspace that is let go at the split, and the other; `at` learns where temporaries lie."""
    rooms = []
    for slot, early in ((first_slot, True), (first_slot + 1, False)):
        placed: list[tuple[int, int, _Span]] = []  # offset, end
        for number, span in sorted(spans.items(), key=lambda item: -item[1].nbytes):
            if (span.last < split) != early:
                continue
            busy = sorted((o, e) for o, e, other in placed if other.first <= span.last and span.first <= other.last)
            offset = 0
            for start, end in busy:
                if offset + span.nbytes <= start:
                    break
                offset = max(offset, end)
            placed.append((offset, offset + _round_up(span.nbytes), span))
            at[number] = Place(slot, offset)
        rooms.append(Workspace(slot, max((end for _, end, _ in placed), default=0)))
    return rooms


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _steps(
    commands: Sequence[Launch | Gemm | Call], at: dict[int, Place], slots: int, native: Any, device: torch.device
) -> list[Step]:
    """Launches and matmuls in as few calls of C++ as possible; matmuls that it has not are PyTorch's."""
    steps: list[Step] = []
    plan: Any = None

    def place(pointer: Pointer) -> Place:
        base = at[pointer.storage]
        return Place(base.slot, base.offset + pointer.offset)

    for command in commands:
        mode = _math_mode(command, native) if isinstance(command, Gemm) else 0
        if isinstance(command, Call) or (isinstance(command, Gemm) and mode is None):
            call = (
                _call(command, place, device) if isinstance(command, Call) else _gemm_of_torch(command, place, device)
            )
            steps.append(call)
            plan = None
            continue
        if plan is None:
            plan = native.Plan(slots)
            steps.append(_native(plan))
        if isinstance(command, Launch):
            _add_launch(plan, command, place)
        else:
            a, b, out = command.a, command.b, command.out
            plan.gemm(
                place(a.at), place(b.at), place(out.at), (out.rows, out.cols, a.cols), (a.pitch, b.pitch, out.pitch),
                a.transposed, b.transposed, command.accumulate, command.alpha, CUDA_TYPES[a.dtype], mode,
            )  # fmt: skip
    return steps


def _native(plan: Any) -> Step:
    return plan.run  # type: ignore[no-any-return]


def _call(call: Call, place: Callable[[Pointer], Place], device: torch.device) -> Step:
    places = {name: place(pointer) for name, pointer in call.pointers.items()}
    kernel, struct, numbers = call.kernel, call.struct, call.numbers
    like = torch.empty(0, device=device)

    def run(index: int, stream: int, handle: int, addresses: list[int]) -> None:
        here = {name: addresses[slot] + offset for name, (slot, offset) in places.items()}
        cuda_call.again(kernel, struct, numbers | here, like)

    return run


def _add_launch(plan: Any, launch: Launch, place: Callable[[Pointer], Place]) -> None:
    meta = launch.compiled.metadata
    plan.launch(launch.compiled.function, launch.grid, 32 * meta.num_warps, meta.shared)
    for p in launch.parameters:
        if isinstance(p, Pointer):
            plan.pointer(*place(p))
        elif isinstance(p, Map):
            plan.map(*place(p.at), p.dtype, p.element_bytes, p.swizzle, p.shape, p.strides, p.box)
        else:
            plan.bytes(bytes(8) if p is None else p)


def _math_mode(gemm: Gemm, native: Any) -> int | None:
    """cublasMath_t that PyTorch would set around it; None where it would call something else of cuBLAS, or it may."""
    a, b, out = gemm.a, gemm.b, gemm.out
    library = torch.backends.cuda.preferred_blas_library().name  # type: ignore[attr-defined]
    plain = out.dtype == torch.float32 and a.dtype == b.dtype and a.dtype in CUDA_TYPES and not out.transposed
    if not (native.has_gemm and plain and min(out.rows, out.cols, a.cols) > 1):
        return None
    if library not in ("Default", "Cublas") or torch.cuda.tunable.is_enabled():
        return None
    settings = torch.backends.cuda.matmul
    allowed: Any = {
        torch.float16: settings.allow_fp16_reduced_precision_reduction,
        torch.bfloat16: settings.allow_bf16_reduced_precision_reduction,
    }.get(a.dtype, True)
    return 0 if allowed is True else None


def _gemm_of_torch(gemm: Gemm, place: Callable[[Pointer], Place], device: torch.device) -> Step:
    def matrix(addresses: list[int], m: Matrix) -> Tensor:
        (slot, offset), numbers = place(m.at), (m.cols - 1) * m.strides[1] + (m.rows - 1) * m.strides[0] + 1
        memory = torch._C._construct_storage_from_data_pointer(
            addresses[slot] + offset, device, numbers * m.dtype.itemsize
        )
        return torch.empty(0, dtype=m.dtype, device=device).set_(memory, 0, (m.rows, m.cols), m.strides)

    def run(index: int, stream: int, handle: int, addresses: list[int]) -> None:
        a, b, out = (matrix(addresses, m) for m in (gemm.a, gemm.b, gemm.out))
        same, plain = a.dtype == out.dtype, not gemm.accumulate and gemm.alpha == 1
        how: dict[str, Any] = {"beta": int(gemm.accumulate), "alpha": gemm.alpha, "out": out}
        if plain:
            torch.mm(a, b, out=out) if same else torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        elif same:
            torch.addmm(out, a, b, **how)
        else:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, **how)

    return run
