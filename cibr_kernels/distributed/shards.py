"""Who has which rows: one small header from every rank before any work, so that all agree or all raise.

A header is 32 int64: whether the rank's own checks passed, its rows, the name of the loss, and per input its width,
dtype, kind of device and whether it needs a gradient, then the loss's options.  256 bytes per rank, one all-gather.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from cibr_kernels import checks
from cibr_kernels.distributed import collectives

_SIZE = 32
_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "meta")
_CHECKS = ("every call", "first call")
_check = "every call"
_agreed: dict[tuple[dist.ProcessGroup, tuple[int, ...]], tuple[int, ...]] = {}


@dataclass(frozen=True)
class Shards:
    """The rows of one batch over the ranks of a group: rank r has rows[r] of them, in the order of the ranks."""

    group: dist.ProcessGroup
    rank: int
    rows: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.rows)

    @property
    def total(self) -> int:
        return sum(self.rows)

    @property
    def local(self) -> int:
        return self.rows[self.rank]

    @property
    def offset(self) -> int:
        """Rows of earlier ranks: where this rank's begin."""
        return sum(self.rows[: self.rank])

    @property
    def share(self) -> float:
        """world * local / total, 1 where shards are equal: what a mean over local rows is multiplied with."""
        return self.world * self.local / self.total


def header_check() -> str:
    """When ranks exchange headers: "every call" (the default) or "first call"."""
    return _check


def set_header_check(when: str) -> None:
    """ "every call", or "first call" of each combination of shape, dtype and options.

    The exchange waits on the host for every rank.  A group with a CPU backend (`init_process_group()` without a name
    has gloo beside NCCL) makes it on the host and leaves the device alone; an NCCL-only group has to synchronise with
    its device once.  "first call" makes no exchange in the steady state, as a CUDA graph needs, and is a promise: ranks
    change their number of rows, dtype and options in the same call, or the collectives that follow do not match and the
    group times out.  (A rank cannot see by itself that another one has a shorter last batch.)
    """
    global _check
    checks.choice("when", when, _CHECKS)
    _check = when
    _agreed.clear()


class Agreement:
    """`with Agreement(op, process_group, **options) as agreement:` around a loss's own checks.

    The block calls `describe`; at its end ranks exchange headers.  If any rank's block raised, or two ranks differ, all
    ranks raise: the one at fault its own error, the others a ValueError that names it.  Afterwards `shards` is what was
    agreed, or None without a group.  A `Shards` instead of a group was agreed before and is only checked.
    """

    def __init__(self, op: str, process_group: dist.ProcessGroup | Shards | None, **options: object) -> None:
        self.op, self.options = op, options
        self.shards = process_group if isinstance(process_group, Shards) else None
        self.group = None if isinstance(process_group, Shards) else process_group
        self.rows = 0
        self.facts: dict[str, int] = {}
        self.device = torch.device("cpu")
        if process_group is not None and torch.compiler.is_compiling():
            raise RuntimeError(f"{op} with a process_group cannot be traced: torch.compile runs it in a graph break")

    def __enter__(self) -> Agreement:
        return self

    def describe(self, **tensors: Tensor) -> None:
        """The inputs by name, (rows, width) each; the first one's rows are this rank's shard."""
        first = next(iter(tensors.values()))
        self.rows, self.device = first.shape[0], first.device
        if self.shards is not None and self.shards.local != self.rows:
            raise ValueError(f"{self.op} got {self.rows} rows, but these shards have {self.shards.local} on this rank")
        if self.group is None:
            return
        for name, t in tensors.items():
            self.facts[f"width of {name}"] = t.shape[1]
            self.facts[f"dtype of {name}"] = checks.FLOATS.index(t.dtype)
            self.facts[f"device of {name}"] = _DEVICES.index(t.device.type) if t.device.type in _DEVICES else -1
            self.facts[f"gradient of {name}"] = int(torch.is_grad_enabled() and t.requires_grad)
        for name, value in self.options.items():
            self.facts[f"option {name}"] = zlib.crc32(repr(value).encode())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self.group is None or not (kind is None or issubclass(kind, Exception)):
            return
        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        if rank < 0:
            raise ValueError(f"{self.op}: this process is not in the process_group it was given")
        head = (int(error is None), self.rows, zlib.crc32(" ".join([self.op, *self.facts]).encode()))
        header = (*head, *self.facts.values())
        header += (0,) * (_SIZE - len(header))
        if world == 1:
            rows: tuple[int, ...] = (self.rows,)
        elif error is None and _check == "first call" and (self.group, header) in _agreed:
            rows = _agreed[self.group, header]
        else:
            table = self._exchange(header, rank, world)
            if error is not None:
                return  # the block's own error goes on
            self._compare(table)
            rows = tuple(line[1] for line in table)
            if _check == "first call":
                _agreed[self.group, header] = rows
        if error is None:
            self.shards = Shards(self.group, rank, rows)

    def _exchange(self, header: tuple[int, ...], rank: int, world: int) -> list[list[int]]:
        """-> every rank's header.  Where the group has a CPU backend the accelerator takes no part in it."""
        assert self.group is not None
        on_host = "cpu:" in dist.get_backend_config(self.group)
        device = torch.device("cpu") if on_host else self._accelerator()
        try:
            sent = torch.tensor(header, dtype=torch.int64, device=device)
            return collectives.all_gather(sent, self.group, "header").view(world, _SIZE).tolist()
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.op}: rank {rank} of {world} waited in vain for the others: one of them has died, failed before "
                f"it called {self.op}, or never called it ({error})"
            ) from error

    def _accelerator(self) -> torch.device:
        """The features' device, or this process's current one where a rank was given CPU tensors by mistake."""
        if self.device.type != "cpu":
            return self.device
        return torch.device("cuda", torch.cuda.current_device())

    def _compare(self, table: list[list[int]]) -> None:
        refused = [r for r, line in enumerate(table) if not line[0]]
        if refused:
            raise ValueError(f"{self.op}: rank {refused[0]} refused its arguments; its own error says why")
        for column, name in [(2, ""), *enumerate(self.facts, 3)]:
            values = [line[column] for line in table]
            other = next((r for r, value in enumerate(values) if value != values[0]), None)
            if other is None:
                continue
            if not name:
                raise ValueError(f"{self.op}: rank {other} calls another loss than rank 0, or with other inputs")
            kind, _, rest = name.partition(" ")
            if kind == "option":
                raise ValueError(f"{self.op}: rank {other} has another {rest} than rank 0")
            first, second = _in_words(kind, values[0]), _in_words(kind, values[other])
            raise ValueError(f"{self.op}: ranks disagree on the {name}: {first} on rank 0, {second} on rank {other}")


def _in_words(kind: str, value: int) -> str:
    if kind == "dtype":
        return str(checks.FLOATS[value])
    if kind == "device":
        return _DEVICES[value] if value >= 0 else "another one"
    if kind == "gradient":
        return "needed" if value else "not needed"
    return str(value)
