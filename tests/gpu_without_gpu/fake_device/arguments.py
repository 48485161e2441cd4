"""Kernels with every kind of argument that a launch of the package has, in a direction of plans.

As a case of fake_device.replays it is "arguments".  Descriptors are there from Triton 3.4 on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cibr_kernels.dispatch import plans, triton_call

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

NUMBERS = {
    "one": 1,  # a constant to the compiler
    "sixteen": 48,  # known to be divided by 16
    "free": 48,  # not looked at: do_not_specialize
    "odd": -7,
    "long": -(1 << 40) - 3,
    "unsigned": (1 << 64) - 5,
    "real": 0.1,  # float32 to the kernel
}


@triton.jit(do_not_specialize=["free"])
def every_kind(
    x, half, aside, none, one, sixteen, free, odd, long, unsigned, real, out, GIVEN: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(x + at) + tl.load(half + at) + tl.load(aside + at) + real
    if GIVEN:
        found += tl.load(none + at)
    whole = one + sixteen + free + odd + long + unsigned.to(tl.int64)
    tl.store(out + at, found + whole.to(tl.float32))


@triton.jit
def tiled(source, scale, target, rows, last, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK
    tl.store(last, rows)
    if row < rows:
        target.store([row, 0], (source.load([row, 0]) * scale).to(target.dtype))


def direction(x: Tensor, half: Tensor) -> tuple[Tensor, ...]:
    """x (512, 64) float32, half of the same shape bfloat16 -> two of each."""
    out, copied = torch.empty_like(x), torch.empty_like(half)
    tensors = {"x": x, "half": half, "aside": x.view(-1)[1:], "none": None, **NUMBERS, "out": out}
    triton_call.launch(every_kind, (8, 2, 3), tensors, {"GIVEN": False, "BLOCK": 64}, num_warps=2, num_stages=1)
    if TensorDescriptor is not None:
        maps = [TensorDescriptor.from_tensor(t, [64, 64]) for t in (half, copied)]
        given = {"source": maps[0], "scale": 0.5, "target": maps[1], "rows": x.shape[0], "last": out}
        triton_call.launch(tiled, (8,), given, {"BLOCK": 64})
    return out, copied


def step() -> tuple[Tensor, ...]:
    x = torch.empty(512, 64, device="cuda")
    return plans.run(("every kind of argument",), direction, (x, x.bfloat16()))
