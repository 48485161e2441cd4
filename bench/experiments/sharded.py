"""What a distributed loss moves, keeps and gets right, measured on real ranks over gloo: evidence for scale.py.

Bytes are counted where PyTorch dispatches a collective, so the same count serves every implementation; memory is the
peak of the process beyond what it held before; gradients are compared with one process in float64 after DDP's average.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing as mp
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cibr_kernels as ck
from cibr_kernels.distributed import traffic

Loss = Callable[..., Tensor]  # this rank's rows of both towers, the scale, and siglip's bias -> its loss
LEAVES = ("image", "text", "scale", "bias")
# a bias at which positives and negatives have parts of one size in the gradients; SigLIP starts with 10 and -10
NUMBERS = {"clip": (14.25,), "siglip": (10.0, -6.0)}
SECONDS = 300


# ------------------------------------------------------------------------------------------------ implementations
def _fused(strategy: str, stash: bool = False) -> Callable[[int, int], Loss]:
    def make(rank: int, world: int) -> Loss:
        ck.set_stash_budget(2**40 if stash else 0)
        group = dist.group.WORLD
        return lambda x, y, scale: ck.clip_loss(x, y, scale, process_group=group, strategy=strategy)

    return make


def _fused_siglip(strategy: str) -> Callable[[int, int], Loss]:
    def make(rank: int, world: int) -> Loss:
        group = dist.group.WORLD
        return lambda x, y, scale, bias: ck.siglip_loss(x, y, scale, bias, process_group=group, strategy=strategy)

    return make


def _open_clip(local_loss: bool, gather_with_grad: bool) -> Callable[[int, int], Loss]:
    def make(rank: int, world: int) -> Loss:
        from open_clip.loss import ClipLoss

        return ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=world)

    return make


def _open_siglip(dist_impl: str) -> Callable[[int, int], Loss]:
    def make(rank: int, world: int) -> Loss:
        from open_clip.loss import SigLipLoss

        return SigLipLoss(rank=rank, world_size=world, dist_impl=dist_impl)

    return make


def _siglip_kernel(strategy: str) -> Callable[[int, int], Loss]:
    """Its Triton kernel in Triton's interpreter; as published it asks a GPU for its capability when it is imported."""

    def make(rank: int, world: int) -> Loss:
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
        from siglip_kernel.distributed import DistributedSigLIPLoss

        return DistributedSigLIPLoss(strategy=strategy, rank=rank, world_size=world)

    return make


def _inf_cl(rank: int, world: int) -> Loss:
    """Its ring in PyTorch, which has the collectives and the gradients of its Triton one; one direction per call."""
    from inf_cl import cal_ring_loss

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        ways = [cal_ring_loss(a, b, scale=scale, head_dim=min(a.shape[1], 256)) for a, b in ((x, y), (y, x))]
        return (ways[0].mean() + ways[1].mean()) / 2

    return loss


def _memeff(rank: int, world: int) -> Loss:
    """Its Triton kernels in Triton's interpreter; two of its functions ask for a GPU and are replaced."""
    from memeff import distributed_clip_loss as theirs

    theirs._validate_features = lambda x, y: None
    theirs._backward_blocks = lambda device: (128, 64, 4, 1)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        module = theirs.DistributedMemoryEfficientCLIPLoss(1 / scale.item(), normalized_inputs=True, stable=False)
        return module(x, y)

    return loss


@dataclass(frozen=True)
class Implementation:
    """`passes`: matmuls of (n, d) by (d, N) per rank, forward and backward; with all rows on every rank times W."""

    make: Callable[[int, int], Loss]
    passes: tuple[str, str]
    package: str = "torch"  # what has to be installed
    loss: str = "clip"  # of NUMBERS
    environment: dict[str, str] = field(default_factory=dict)  # of fresh processes: triton reads it when imported


IMPLEMENTATIONS = {
    "clip_loss, gather, stash": Implementation(_fused("gather", stash=True), ("1", "2")),
    "clip_loss, gather": Implementation(_fused("gather"), ("1", "3")),
    "clip_loss, ring": Implementation(_fused("ring"), ("1", "3")),
    "open_clip (local, grad)": Implementation(_open_clip(True, True), ("2", "4"), "open_clip"),
    "open_clip (local, no grad)": Implementation(_open_clip(True, False), ("2", "2"), "open_clip"),
    "open_clip (global, grad)": Implementation(_open_clip(False, True), ("W", "2W"), "open_clip"),
    "open_clip (global, no grad)": Implementation(_open_clip(False, False), ("W", "2W"), "open_clip"),
    "inf_cl cal_ring_loss": Implementation(_inf_cl, ("2", "8"), "inf_cl"),
    "memeff (interpreter)": Implementation(
        _memeff, ("1", "3"), "memeff", environment={"TRITON_INTERPRET": "1", "MEMEFF_INPUT_PRECISION": "ieee"}
    ),
}
IMPLEMENTATIONS |= {
    f"siglip_loss, {strategy}": Implementation(_fused_siglip(strategy), ("3", "0"), loss="siglip")
    for strategy in ("gather", "ring")
}
IMPLEMENTATIONS |= {
    f"open_clip SigLipLoss, {mode}": Implementation(_open_siglip(mode), passes, "open_clip", "siglip")
    for mode, passes in {
        "bidir": ("1", "2"),
        "shift": ("1", "2"),
        "reduce": ("1*", "2*"),
        "gather": ("1*", "2*"),
    }.items()
}
IMPLEMENTATIONS |= {
    f"siglip_kernel, {strategy}": Implementation(
        _siglip_kernel(strategy), ("3", "0"), "siglip_kernel", "siglip", {"TRITON_INTERPRET": "1"}
    )
    for strategy in ("gather", "ring")
}


# ------------------------------------------------------------------------------------------------ measuring
class Wire(TorchDispatchMode):
    """Counts the bytes between this rank and the others, by the best algorithm of each collective."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world, self.bytes = rank, world, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.bytes += self._moved(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _moved(self, name: str, args: Any) -> float:
        others = (self.world - 1) / self.world
        if name == "_allgather_base_":
            return _size(args[0]) * others
        if name == "allgather_":
            return _size(args[0]) * others
        if name == "_reduce_scatter_base_":
            return _size(args[1]) * others
        if name == "alltoall_base_":
            return max(_size(args[0]), _size(args[1])) * others
        if name == "allreduce_":
            return 2 * _size(args[0]) * others
        if name == "scatter_":  # the root sends every part but its own
            return _size(args[1]) * others
        if name == "send":
            return float(_size(args[0]))
        if name in ("recv_", "monitored_barrier_", "barrier"):
            return 0.0
        raise NotImplementedError(f"no rule for the bytes of c10d::{name}")


def _size(t: Any) -> int:
    return t.numel() * t.itemsize if isinstance(t, Tensor) else sum(map(_size, t))


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def _inputs(n: int, d: int, world: int, loss: str) -> tuple[Tensor, ...]:
    """All ranks' rows of both towers, and the numbers of a loss."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n * world, d, generator=generator)
    y = F.normalize(x + 2 * torch.randn(n * world, d, generator=generator), dim=1)
    return F.normalize(x, dim=1), y, *map(torch.tensor, NUMBERS[loss])


def _truth(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The loss of all rows in one process: clip's without a bias, else the sigmoid loss."""
    logits = scale * x @ y.T
    if bias is None:
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * (logits + bias)).sum() / len(logits)


def measure(rank: int, world: int, name: str, n: int, d: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes forward and backward, the header's, and the peak of memory of one step of a loss."""
    make, loss_name = IMPLEMENTATIONS[name].make, IMPLEMENTATIONS[name].loss
    rows = slice(rank * n, (rank + 1) * n)
    x, y, *numbers = _inputs(8, d, world, loss_name)
    x, y = (t[rank * 8 :][:8].to(dtype).requires_grad_() for t in (x, y))
    make(rank, world)(x, y, *numbers).backward()  # starts threads and gloo's buffers
    x, y, *numbers = _inputs(n, d, world, loss_name)
    x, y = (t[rows].to(dtype).clone().requires_grad_() for t in (x, y))
    loss_fn = make(rank, world)
    dist.barrier()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept of the inputs would hide as much of the loss
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    with Wire(rank, world) as wire, traffic() as meter:
        loss = loss_fn(x, y, *numbers)
        forward = wire.bytes
        loss.backward()
    peak = _status("VmHWM") - before
    counted = sum(meter.bytes.values())
    return {
        "forward": forward - meter.bytes["header"],
        "backward": wire.bytes - forward,
        "peak": peak,
        "header": meter.bytes["header"],
        "counted": counted,
        "wire": wire.bytes,
    }


def ratios(rank: int, world: int, name: str, n: int, d: int) -> dict[str, float]:
    """<gradient, truth> / |truth|^2 after DDP's average, of each of LEAVES; of the towers also what is not along it."""
    loss = IMPLEMENTATIONS[name].loss
    whole = [t.double().requires_grad_() for t in _inputs(n, d, world, loss)]
    _truth(*whole).backward()
    rows = slice(rank * n, (rank + 1) * n)
    own = [(t[rows] if t.dim() else t).detach().float().clone().requires_grad_() for t in whole]
    IMPLEMENTATIONS[name].make(rank, world)(*own).backward()
    found = {}
    for what, t, truth in zip(LEAVES, own, whole, strict=False):
        assert truth.grad is not None
        expected = truth.grad[rows] if truth.dim() else truth.grad
        actual = torch.zeros_like(expected) if t.grad is None else t.grad.double() / world
        if not truth.dim():  # averaged over the ranks, where its truth is on every one of them
            dist.all_reduce(actual)
        products = torch.stack([(actual * expected).sum(), expected.square().sum(), actual.square().sum()])
        if truth.dim():
            dist.all_reduce(products)
        dot, size, length = products.tolist()
        found[what] = dot / size
        if truth.dim():
            found[f"{what} off"] = math.sqrt(max(0.0, 1 - dot**2 / (length * size))) if length else 1.0
    return found


# ------------------------------------------------------------------------------------------------ processes
def run(world: int, function: Callable[..., Any], name: str, *args: Any) -> list[Any]:
    """function(rank, world, name, *args) on ranks over gloo, `name` an implementation's -> their results.

    Raises RuntimeError if a rank failed.
    """
    environment = IMPLEMENTATIONS[name].environment
    context: Any = mp.get_context("spawn" if environment else "forkserver")
    before = dict(os.environ)
    os.environ.update(environment)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(target=_rank, args=(rank, world, f"{folder}/store", sender, function, (name, *args)))
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for key in environment:
            os.environ.pop(key)
        os.environ.update(before)
        answers = [receiver.recv() if receiver.poll(SECONDS) else ("no answer", None) for receiver, _ in pipes]
        for process in processes:
            process.join(10)
            process.kill()
    failures = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
    if failures:
        raise RuntimeError("; ".join(failures))
    return [result for _, result in answers]


def _rank(rank: int, world: int, store: str, sender: Any, function: Callable[..., Any], args: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    answer: tuple[str | None, Any]
    try:
        answer = None, function(rank, world, *args)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}", None
    sender.send(answer)
    if answer[0] is None:
        dist.destroy_process_group()
