"""What clip_loss and siglip_loss share where C++ makes the gradients with the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch.native_call import DTYPES, call, scratch_like
from cibr_kernels.numerics import early_dtype


def loss_with_gradients(
    kernel: str, struct: str, x: Tensor, y: Tensor, scale: Tensor, need_dx: bool, need_dy: bool, own: dict[str, Any]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """-> loss (), dx (n, d), dy (n, d), each None unless needed, dscale () with them; float32 for float16.

    own: the fields of `struct` that the other loss does not have.
    """
    if (need_dx or need_dy) and (made := early_dtype(x.dtype)) != x.dtype:
        x, y = x.to(made), y.to(made)
    dx, dy = scratch_like(x) if need_dx else None, scratch_like(y) if need_dy else None
    n, d = x.shape
    loss, dscale = torch.empty_like(scale), torch.empty_like(scale) if need_dx or need_dy else None
    fields = {
        "x": x,
        "y": y,
        "dtype": DTYPES[x.dtype],
        "n": n,
        "m": n,
        "d": d,
        "scale": scale.item(),
        "dx": dx,
        "dy": dy,
        "dscale": dscale,
        "loss": loss,
        **own,
    }
    call(kernel, struct, n * n * d, fields)
    return loss, dx, dy, dscale
