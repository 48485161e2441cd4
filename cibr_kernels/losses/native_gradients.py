"""What clip_loss and siglip_loss share where C++ makes the gradients with the loss."""

from __future__ import annotations

from torch import Tensor

from cibr_kernels.dispatch.native_call import scratch_like
from cibr_kernels.numerics import early_dtype


def room_for_gradients(
    x: Tensor, y: Tensor, need_dx: bool, need_dy: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """-> x and y in the dtype of the gradients, and memory for dx and dy, None unless needed."""
    if (need_dx or need_dy) and (made := early_dtype(x.dtype)) != x.dtype:
        x, y = x.to(made), y.to(made)
    return x, y, scratch_like(x) if need_dx else None, scratch_like(y) if need_dy else None
