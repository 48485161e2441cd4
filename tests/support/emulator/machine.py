"""The machine: registers, operands and the schedule.

Every virtual register is a numpy array with one entry per lane of a batch of blocks.  All lanes that are at the same
instruction run it together, the group with the lowest program counter first, so that lanes that diverged meet again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .asynchronous import Pending
from .conflicts import Conflicts
from .errors import Deadlock, OutOfBounds, PtxError
from .memory import GlobalMemory
from .numbers import RAW, U64, bits
from .parser import Instruction, Kernel, Operand
from .races import Races

Mask = Any  # bool per lane, or None for all lanes
FAR = 1 << 60  # beyond every program counter
TENSOR_MAPS = 0x6E0000000000  # addresses of the tensor maps among the parameters

INSTRUCTIONS: dict[str, Callable[[Instruction], Callable[[Any, Mask], None]]] = {}
CONTROL: dict[str, Callable[[Any, Instruction, Mask], bool]] = {}  # of control.py; True: the program counter has moved


def instruction(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers f(machine, instruction, mask) as the meaning of an opcode."""

    def register(f: Callable[..., None]) -> Callable[..., None]:
        for name in names:
            INSTRUCTIONS[name] = lambda x: lambda s, mask: f(s, x, mask)
        return f

    return register


def bound(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers f(instruction) -> g(machine, mask), for opcodes that decide once what their modifiers mean."""

    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            INSTRUCTIONS[name] = f
        return f

    return register


def bind(x: Instruction) -> Callable[[Any, Mask], None]:
    if x.op not in INSTRUCTIONS:
        raise PtxError("instruction not implemented")
    return INSTRUCTIONS[x.op](x)


class Machine:
    """One launch of a kernel over (some blocks of) a grid."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        *,
        dynamic_shared: int = 0,
        shared_limit: int = 232448,
        blocks: Sequence[int] | None = None,
        batch: int = 8,
        check_races: bool = True,
        check_conflicts: bool = True,
        max_instructions: int = 3_000_000,
    ):
        """args: addresses and numbers; blocks: linear numbers of the blocks to run, None for all."""
        self.kernel, self.memory = kernel, memory
        self.grid, self.block = (tuple(int(v) for v in d) + (1,) * (3 - len(d)) for d in (grid, block))
        self.threads = int(np.prod(self.block))
        if self.threads % 32:
            raise PtxError("the number of threads of a block must be a multiple of 32")
        if kernel.threads and self.threads > kernel.threads:
            raise PtxError(f"{self.threads} threads, but the kernel was compiled for {kernel.threads}")
        self.shared_bytes = -(-(kernel.static_shared + dynamic_shared) // 16) * 16
        if self.shared_bytes > shared_limit:
            raise OutOfBounds(f"{self.shared_bytes} B of shared memory, the limit is {shared_limit}")
        self.check_races, self.batch, self.max_instructions = check_races, batch, max_instructions
        self.conflicts = Conflicts(len(memory.bytes)) if check_conflicts else None
        total = int(np.prod(self.grid))
        self.blocks = list(range(total)) if blocks is None else list(blocks)
        self.executed = 0
        self.host_maps: dict[Any, dict[str, Any]] = {}
        self.params: dict[str, bytes] = {}
        padded = list(args) + [0] * (len(kernel.params) - len(args))  # Triton's scratch pointers may be left out
        for (name, kind, size), value in zip(kernel.params, padded, strict=True):
            self.params[name] = self._parameter(kind, size, value)
        self.units = [
            unit
            for unit, used in (
                ("wgmma", "wgmma" in kernel.ops),
                ("tensor", "tcgen05" in kernel.ops),
                ("tma", any(x.op == "cp" and "bulk" in x.mods for x in kernel.ins)),
            )
            if used
        ]

    def _parameter(self, kind: str, size: int, value: Any) -> bytes:
        if isinstance(value, dict):  # a tensor map made on the host, as tma.py describes it
            address = TENSOR_MAPS + 128 * len(self.host_maps)
            self.host_maps[address] = value
            return address.to_bytes(8, "little")
        if isinstance(value, bytes):
            return value.ljust(size, b"\0")
        if isinstance(value, float) or kind[0] == "f":
            return np.array(value, np.float32 if size == 4 else np.float64).tobytes()
        return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")

    # ---- schedule
    def run(self) -> None:
        for i in range(0, len(self.blocks), self.batch):
            self._prepare(self.blocks[i : i + self.batch])
            self._run_batch()
        if self.conflicts is not None:
            self.conflicts.finish()

    def _prepare(self, blocks: list[int]) -> None:
        count, t = len(blocks), self.threads
        self.batch_blocks = blocks
        self.lanes = lanes = count * t
        zero = {d: np.zeros(lanes, d) for d in (np.bool_, *RAW.values())}
        self.R: list[np.ndarray] = [zero[d] for d in self.kernel.raw]  # put replaces arrays, never writes into them
        self.thread = np.tile(np.arange(t, dtype=np.int64), count)
        self.grid_block = np.repeat(np.array(blocks, np.int64), t)
        self.special = {
            f"%{name}.{axis}": values.astype(np.uint32)
            for name, n, size in (("tid", self.thread, self.block), ("ctaid", self.grid_block, self.grid))
            for axis, values in zip("xyz", (n % size[0], n // size[0] % size[1], n // (size[0] * size[1])), strict=True)
        }
        for name, size in (("ntid", self.block), ("nctaid", self.grid)):
            self.special |= {
                f"%{name}.{axis}": np.full(lanes, v, np.uint32) for axis, v in zip("xyz", size, strict=True)
            }
        self.special["%laneid"], self.special["%warpid"] = (
            (v % t).astype(np.uint32) for v in (self.thread % 32, self.thread // 32)
        )
        for name in ("%cluster_ctarank", "%clock", "%clock64", "%globaltimer", "%smid"):
            self.special[name] = zero[np.uint32]
        self.block_of = np.repeat(np.arange(count), t)  # in the batch
        self.warp = np.arange(lanes) // 32  # in the batch
        self.warps_per_block = t // 32
        self.shared_width = max(self.shared_bytes, 16)
        self.block_offset = self.block_of * self.shared_width
        self.shared = np.full(self.shared_width * count + 64, 0xFF, np.uint8)  # NaN in every float format
        self.local_stride = -(-self.kernel.local[1] // 16) * 16 if self.kernel.local else 0
        self.local = np.zeros(self.local_stride * lanes, np.uint8)
        self.races = Races(count, self.warps_per_block, self.shared_width, self.units) if self.check_races else None
        self.actor = self.races.of_warp[self.warp] if self.races else self.warp
        self.pending = Pending()
        self.copies: list[Any] = []  # cp.async in flight
        self.copy_groups = np.zeros(lanes // 32, np.int64)  # committed by each warp
        self.mbarriers: dict[tuple[int, int], Any] = {}
        self.maps = dict(self.host_maps)
        self.tensor_memory = np.full((count, 128, 512), 0xFFFFFFFF, np.uint32) if "tensor" in self.units else None
        self.barriers: dict[tuple[int, int], Any] = {}  # (block, number): control.Barrier
        self.alive = np.ones(lanes, bool)
        self.blocked = np.zeros(lanes, bool)  # at a barrier
        self.asleep = np.zeros(lanes, bool)  # in try_wait on a phase that is not complete: woken by the next arrival
        self.regroup = False  # set by an instruction after which the lanes that can run are others than before
        self.stored = False  # set with it by one that wrote `pcs` itself

    def _run_batch(self) -> None:
        ins, n = self.kernel.ins, len(self.kernel.ins)
        self.pcs = np.zeros(self.lanes, np.int64)  # of the lanes outside the running group
        self.pc, self.limit = 0, FAR  # of the group; lowest of the others
        self.mask: Mask = None
        while True:
            if self.regroup or self.pc >= self.limit or self.pc >= n:
                if not self.stored:
                    self.pcs[slice(None) if self.mask is None else self.mask] = self.pc
                if not self._next_group(n):
                    return
            x = ins[self.pc]
            self.executed += 1
            if self.executed > self.max_instructions:
                raise Deadlock("instruction limit reached: an endless loop?")
            mask = self.mask
            if x.pred is not None:
                p = self.R[x.pred[0]]
                p = ~p if x.pred[1] else p
                mask = p if mask is None else p & mask
            control = CONTROL.get(x.op)
            try:
                self.current = x
                if control is not None and control(self, x, mask):
                    continue
                if self.pending.registers and not self.pending.registers.keys().isdisjoint(x.registers):
                    self.pending.check(self, x, mask)
                if x.run is None:
                    x.run = bind(x)
                x.run(self, mask)
            except PtxError as e:
                raise type(e)(
                    f"{e}\n  at {x.where()}  (blocks {self.batch_blocks[0]}..{self.batch_blocks[-1]})"
                ) from None
            except Exception as e:
                raise PtxError(f"{type(e).__name__}: {e}\n  at {x.where()}") from e
            self.pc += 1

    def _next_group(self, n: int) -> bool:
        """Chooses the lanes with the lowest program counter; False when all are done."""
        self.regroup = self.stored = False
        ready = np.where(self.alive & ~self.blocked & ~self.asleep, self.pcs, FAR)
        self.pc = int(ready.min())
        if self.pc >= n:
            if self.asleep.any() or self.blocked.any():
                raise Deadlock("deadlock: " + self._waiting())
            return False
        group = ready == self.pc
        others = ready[~group]
        self.limit = int(others.min()) if len(others) else FAR
        self.mask = None if group.all() else group
        return True

    def _waiting(self) -> str:
        lanes = np.flatnonzero(self.alive & (self.blocked | self.asleep))
        seen = {
            (
                int(self.warp[i]) % self.warps_per_block,
                bool(self.blocked[i]),
                self.kernel.ins[int(self.pcs[i]) - 1].where(),
            )
            for i in lanes[self.block_of[lanes] == self.block_of[lanes[0]]]
        }
        return "; ".join(f"warp {w} waits at a{' ' if b else 'n m'}barrier, {at}" for w, b, at in sorted(seen))

    def active(self, mask: Mask) -> np.ndarray:
        """Indices of the active lanes."""
        return np.arange(self.lanes) if mask is None else np.flatnonzero(mask)

    def active_warps(self, mask: Mask) -> np.ndarray:
        """Indices of the warps that have active lanes."""
        return np.arange(self.lanes // 32) if mask is None else np.flatnonzero(mask.reshape(-1, 32).any(1))

    def whole_warps(self, mask: Mask) -> np.ndarray:
        """Indices of the warps that execute a warp-wide instruction.  Raises if a warp is divided."""
        if mask is None:
            return np.arange(self.lanes // 32)
        lanes = mask.reshape(-1, 32)
        some = lanes.any(1)
        if not np.array_equal(some, lanes.all(1)):
            raise PtxError("warp-wide instruction in divergent code")
        return np.flatnonzero(some)

    # ---- operands
    def get(self, operand: Operand, dtype: Any) -> Any:
        """Value of an operand as `dtype`: one entry per lane, or a numpy scalar."""
        return reader(self.kernel, operand, dtype)(self)

    def lanewise(self, operand: Operand, dtype: Any) -> np.ndarray:
        """`get`, always one entry per lane."""
        value = self.get(operand, dtype)
        return value if np.ndim(value) else np.full(self.lanes, value)

    def put(self, operand: Operand, value: Any, mask: Mask) -> None:
        if operand[0] != "reg":
            if operand == ("sym", "_"):
                return
            raise PtxError(f"cannot write to {operand}")
        number = operand[1]
        v = np.asarray(value)
        if v.dtype is not self.kernel.words[number]:
            want = self.kernel.raw[number]
            if want is np.bool_:
                v = v.astype(np.bool_)
            else:
                if v.dtype.itemsize != np.dtype(want).itemsize:
                    v = v.astype(want) if v.dtype.kind in "ui" else v.view(RAW[8 * v.dtype.itemsize]).astype(want)
                v = v.view(want)
        if v.shape != (self.lanes,):
            v = np.full(self.lanes, v)
        self.R[number] = v if mask is None else np.where(mask, v, self.R[number])

    def address(self, operand: Operand) -> np.ndarray:
        """Byte address (int64) per lane of a memory operand."""
        base = operand[1]
        if base[0] == "reg":
            a = self.R[base[1]].astype(np.int64)
            return a + operand[2] if operand[2] else a
        return np.full(self.lanes, int(self.get(base, U64)) + operand[2], np.int64)


def reader(kernel: Kernel, operand: Operand, dtype: Any) -> Callable[[Machine], Any]:
    """f(machine) -> value of an operand as `dtype`, for instructions that read it often."""
    key = (id(operand), dtype)
    getter = kernel.getters.get(key)
    if getter is None:
        getter = kernel.getters[key] = _getter(kernel, operand, dtype)
    return getter


def _getter(kernel: Kernel, operand: Operand, dtype: Any) -> Callable[[Machine], Any]:
    kind, value = operand[0], operand[1]
    if kind == "reg":
        if dtype is np.bool_:
            return lambda s: s.R[value]
        have, wide = kernel.raw[value], RAW[bits(dtype)]
        if have is dtype:
            return lambda s: s.R[value]
        if bits(have) == bits(dtype) and have is not np.bool_:
            return lambda s: s.R[value].view(dtype)
        return lambda s: s.R[value].astype(wide).view(dtype)
    if kind == "nreg":
        return lambda s: ~s.R[value]
    if kind == "imm":
        if bits(value.dtype) == bits(dtype):
            constant = value.view(dtype)
        else:
            constant = np.float64(value.view(np.float32)) if dtype is np.float64 else value.astype(dtype)
        return lambda s: constant
    if kind == "int":
        if dtype in (np.float16, np.float32, np.float64, np.bool_):
            number = dtype(value)
        else:
            number = np.array([value & ((1 << bits(dtype)) - 1)], RAW[bits(dtype)]).view(dtype)[0]
        return lambda s: number
    if kind == "sym" and value.startswith("%"):
        return lambda s: s.special[value].astype(RAW[bits(dtype)]).view(dtype)
    if kind == "sym" and (value in kernel.shared or (kernel.local and value == kernel.local[0])):
        offset = np.array([kernel.shared.get(value, 0)], RAW[bits(dtype)]).view(dtype)[0]
        return lambda s: offset
    if kind == "sym" and any(value == p[0] for p in kernel.params):  # the address of a tensor map
        return lambda s: (
            np.frombuffer(s.params[value][:8].ljust(8, b"\0"), np.uint64)[0].astype(RAW[bits(dtype)]).view(dtype)
        )
    raise PtxError(f"operand {operand} not understood")
