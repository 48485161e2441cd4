"""What the launchers of the dot family share: where features lie, the shape of a panel, its matmuls, their ends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cibr_kernels.dispatch import triton_call
from cibr_kernels.primitives.dot.lse.triton_configs import blocks

BLOCK_R = 16  # rows of features that a program of an elementwise kernel takes
LONG_TOTAL, MOST_TOTALS = 32768, 64  # parts that one program adds up, programs
ALIGNMENT = 32  # divides the features' width, or they are copied
# addmm of half precision onto float32: PyTorch 2.8 and 2.9 refuse it (pytorch#167931), on ROCm float32 results at all.
ADDS_TO_FLOAT32 = torch.__version__ >= "2.11"
LEAST_ROWS, LEAST_COLS = 2048, 1024  # of a panel


def rows_of_panel(most: int, most_bytes: int, n: int, m: int, itemsize: int) -> int:
    """Rows of P (rows, m), a multiple of 128 or n."""
    return min(n, most, max(LEAST_ROWS, most_bytes // (itemsize * pitch(m)) // 128 * 128))


def cols_of_panel(most: int, least_bytes: int, rows: int, n: int, m: int, d: int, itemsize: int) -> int:
    """Columns of P (rows, cols), a multiple of 128 or m, so that P takes `least_bytes` or twice the features' bytes.

    Columns are cut rather than rows: dx has a wave of tiles at 8192 rows, and each panel of rows reads dy's sums.
    """
    size = max(least_bytes, 2 * itemsize * (n + m) * d)
    return min(m, most, max(LEAST_COLS, size // (itemsize * rows) // 128 * 128))


def is_aligned(t: Tensor) -> bool:
    """TMA, vectors of 16 bytes and the vendor's matmuls want rows that start at 16 bytes, tiles want whole steps.

    By the address: memory that PyTorch did not allocate (DLPack, a flat parameter of FSDP) starts anywhere.
    """
    return t.shape[1] % ALIGNMENT == 0 and triton_call.address(t) % 16 == 0


def aligned(t: Tensor) -> Tensor:
    """t, or a copy of it, widened with zeros."""
    if is_aligned(t):
        return t
    return F.pad(t, (0, -t.shape[1] % ALIGNMENT)) if t.shape[1] % ALIGNMENT else t.clone()


def features_gradient(
    sums: Tensor,
    own: Tensor,
    partner: Tensor,
    out: Tensor,
    along: Tensor,
    *,
    g_positives: Tensor,
    scale: Tensor,
    exponent: Tensor,
    shift: int,
    g_shift: int,
    g: Tensor | None = None,
) -> None:
    """Writes out (rows, d) and along (blocks,): triton_backward.dot_features_gradient_kernel."""
    from cibr_kernels.primitives.dot.lse import triton_backward as kernels

    triton_call.launch(
        kernels.dot_features_gradient_kernel,
        (blocks(own.shape[0], BLOCK_R),),
        {
            "sums": sums,
            "own": own,
            "partner": partner,
            "g_positives": g_positives,
            "scale": scale,
            "exponent": exponent,
            "g": g,
            "out": out,
            "along": along,
            "rows": own.shape[0],
            "partners": partner.shape[0],
            "d": own.shape[1],
            "shift": shift,
            "g_shift": g_shift,
        },
        {"BLOCK_R": BLOCK_R, "BLOCK_D": features_block(own)},
    )


def both_features_gradients(
    x_sums: Tensor,
    y_sums: Tensor,
    x: Tensor,
    y: Tensor,
    dx: Tensor,
    dy: Tensor,
    along: Tensor,
    *,
    g_positives: Tensor,
    scale: Tensor,
    exponent: Tensor,
    first_positive: int,
    g: Tensor | None = None,
) -> None:
    """Writes dx (n, d), dy (m, d) and along (blocks of dx,): triton_backward.dot_both_features_gradients_kernel."""
    from cibr_kernels.primitives.dot.lse import triton_backward as kernels

    x_blocks, y_blocks = blocks(x.shape[0], BLOCK_R), blocks(y.shape[0], BLOCK_R)
    triton_call.launch(
        kernels.dot_both_features_gradients_kernel,
        (x_blocks + y_blocks,),
        {
            "x_sums": x_sums,
            "y_sums": y_sums,
            "x": x,
            "y": y,
            "g_positives": g_positives,
            "scale": scale,
            "exponent": exponent,
            "g": g,
            "dx": dx,
            "dy": dy,
            "along": along,
            "n": x.shape[0],
            "m": y.shape[0],
            "d": x.shape[1],
            "first_positive": first_positive,
            "x_blocks": x_blocks,
        },
        {"BLOCK_R": BLOCK_R, "BLOCK_D": features_block(x)},
    )


def multiply_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out = a b, or out += a b, in float32 whatever the operands' dtype.

    Where PyTorch cannot return float32 from half precision (before 2.8, on the CPU, and on ROCm of old) the operands
    are converted; where it can but not add to float32, the product is a temporary of out's size.
    """
    refuses = a.device.type == "cpu" or not hasattr(torch.ops.aten.mm, "dtype_out")
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif refuses or (torch.version.hip and not ADDS_TO_FLOAT32):
        multiply_into(out, a.float(), b.float(), accumulate=accumulate)
    elif not accumulate:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    elif ADDS_TO_FLOAT32:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        out += torch.ops.aten.mm.dtype(a, b, torch.float32)


def total(parts: Tensor, out: Tensor | None = None) -> Tensor:
    """(): the sum of parts, in a fixed order; by several programs first where one would take long.  out: where to."""
    from cibr_kernels.primitives.dot.lse import triton_backward as kernels

    count = parts.numel()
    programs = min(MOST_TOTALS, blocks(count, LONG_TOTAL))
    last = programs <= 1
    sums = out if last and out is not None else parts.new_empty(() if last else programs)
    triton_call.launch(
        kernels.dot_total_kernel, (max(programs, 1),), {"parts": parts, "out": sums, "count": count}, {"BLOCK": 1024}
    )
    return sums if last else total(sums, out)


def features_block(t: Tensor) -> int:
    """Features at a time in elementwise kernels: a power of two (256 crashes Triton 3.8 for gfx1100)."""
    return min(128, 1 << (t.shape[1] - 1).bit_length())


def pitch(m: int) -> int:
    """Columns in memory of an (n, m) matrix: rows stay aligned to 16 bytes and more."""
    return blocks(m, 16) * 16
