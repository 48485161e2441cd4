"""`bench gpu --columns`: what P by columns saves in memory and costs in time, counted and predicted without a GPU.

The backward of clip_loss makes P of 8192 rows at a time.  With the cut it makes it of some of the columns: P is small,
and dx is the sum of a matmul for each cut.  Both ways run on fake tensors (record.py), nothing else changed.

    peak      bytes that are alive at once beyond inputs, as PyTorch's allocator counts them
    waves     tiles of a matmul's result over the processors, in tiles of 128 x 256, which are assumed
    GB        that the launches move: operands read once, results written once
    ms        predict.py's, with matmuls that take whole waves where they have less than eight of them
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.static import predict, record
from bench.static.gpus import GPUS
from bench.static.predictions import MEMORY, assumptions
from cibr_kernels.losses.clip import triton as clip
from cibr_kernels.primitives.dot.lse import triton as dot_lse

SIZES = ((65536, 512), (65536, 768), (32768, 512))
WAYS = {"rows": dot_lse.Panels(backward_cols=1 << 40, backward_bytes=1 << 60), "columns": dot_lse.PANELS}
TILE = 128, 256  # of a matmul's result that one processor makes at a time
ROUNDING = 512  # bytes, of PyTorch's allocator


@dataclass(frozen=True)
class Cost:
    """A forward and backward of clip_loss on bfloat16 features, n x d, by one of WAYS."""

    n: int
    d: int
    way: str
    capability: int
    peak_bytes: int
    launches: int
    waves: tuple[float, float]  # of a matmul for dx, for dy
    moved_bytes: float
    milliseconds: float


class Live(TorchDispatchMode):
    """Counts the bytes of tensors made inside that are alive; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.tensors: Counter[int] = Counter()  # by storage: a view keeps it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        inputs = {_storage(t) for t in _tensors((args, kwargs))} - self.tensors.keys()
        for t in _tensors(made):
            if _storage(t) not in inputs:
                self._made(t)
        return made

    def _made(self, t: Tensor) -> None:
        storage, size = _storage(t), -(-t.untyped_storage().nbytes() // ROUNDING) * ROUNDING
        if not self.tensors[storage]:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self.tensors[storage] += 1
        weakref.finalize(t, self._gone, storage, size)

    def _gone(self, storage: int, size: int) -> None:
        self.tensors[storage] -= 1
        if not self.tensors[storage]:
            del self.tensors[storage]
            self.bytes -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def cost(n: int, d: int, way: str, capability: int) -> Cost:
    """Of one way on the GPU of a compute capability."""
    gpu, panels = GPUS[capability], WAYS[way]
    with record.recording(capability) as recorder:
        x, y = (torch.empty(n, d, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        scale, g = (torch.empty((), device="cuda") for _ in range(2))
        with Live() as live:
            loss, *kept = clip.launch_forward(x, y, scale, False, 0, True, panels)
            gradients = clip.launch_backward(g, x, y, scale, kept, False, True, True, panels)
        del loss, kept, gradients
    events = recorder.events
    step = predict.predict(events, capability, MEMORY)
    gemms = [event for event in events if isinstance(event, record.Gemm)]
    waves = [-(-gemm.m // TILE[0]) * -(-gemm.n // TILE[1]) / gpu.processors for gemm in gemms]
    rate = gpu.peak * predict.TENSOR_EFFICIENCY[capability]
    idle = sum((math.ceil(w) / w - 1) * gemm.flops / rate for gemm, w in zip(gemms, waves, strict=True) if w < 8)
    return Cost(
        n,
        d,
        way,
        capability,
        live.peak,
        len(events),
        (waves[0], waves[1]),
        step.total("bytes"),
        1e3 * (step.total("seconds") + idle),
    )


HEADER = (
    f"{'clip_loss, bfloat16':<22}{'P by':<9}{'peak MB':>8}{'launches':>10}{'waves dx':>10}{'dy':>7}{'GB':>7}{'ms':>9}"
)


def lines(rows: Cost, columns: Cost) -> list[str]:
    """Both ways of a size, and the ratio of the second to the first."""
    found = [
        f"{f'{c.n} x {c.d}':<22}{c.way:<9}{c.peak_bytes / 1e6:>8.0f}{c.launches:>10}{c.waves[0]:>10.2f}"
        f"{c.waves[1]:>7.2f}{c.moved_bytes / 1e9:>7.1f}{c.milliseconds:>9.2f}"
        for c in (rows, columns)
    ]
    peak, moved, time = (
        getattr(columns, name) / getattr(rows, name) for name in ("peak_bytes", "moved_bytes", "milliseconds")
    )
    return [*found, f"{'':<22}{'ratio':<9}{peak:>8.2f}{'':>27}{moved:>7.2f}{time:>9.3f}"]


def main(targets: Sequence[int] = tuple(GPUS), sizes: Iterable[tuple[int, int]] = SIZES) -> list[Cost]:
    """Prints a table for each GPU -> every cost."""
    print(assumptions() + f"\nmatmuls:  in tiles of {TILE[0]} x {TILE[1]}, in whole waves below eight")
    found: list[Cost] = []
    for capability in targets:
        print(f"\n{GPUS[capability].name} (sm_{capability}), forward and backward\n{HEADER}")
        for n, d in sizes:
            pair = [cost(n, d, way, capability) for way in WAYS]
            print("\n".join(lines(*pair)), flush=True)
            found += pair
    return found
