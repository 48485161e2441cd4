"""The training step of `nn.Standardize` on a GPU: four launches, which a plan replays."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import library, plans, triton_call
from cibr_kernels.numerics import ceil_div

BLOCKS = {"BLOCK_R": 64, "BLOCK_H": 64}
FLAGS = 64  # of the flags of blocks, how many are read at a time


def serves(x: Tensor, mean: Tensor) -> bool:
    """Whether x (n, dim) goes this way."""
    float32 = mean.dtype == torch.float32 and x.dtype != torch.float64
    return float32 and triton_call.unsupported(x) is None and library.only_autograd_looks_on(x, mean)


def known(x: Any, buffers: Mapping[str, Any], momentum: float, eps: float) -> Tensor | None:
    """`train` of a call that was checked, and whose launches were recorded, before; else None."""
    if not (isinstance(x, Tensor) and x.is_cuda):
        return None
    mean, started = buffers["mean"], buffers["started"]
    if not library.only_autograd_looks_on(x, mean):
        return None
    inputs = x, mean, buffers["var"], started.view(torch.uint8)
    plan = plans.find(("standardize", momentum, eps), inputs)
    return None if plan is None else plans.replay(plan, inputs)[0]


def train(x: Tensor, mean: Tensor, var: Tensor, started: Tensor, momentum: float, eps: float) -> Tensor:
    """Moves mean, var (dim,) float32 and started (), bool, by x (n, dim) -> x standardised by them, float32."""

    def direction(x: Tensor, mean: Tensor, var: Tensor, started: Tensor) -> tuple[Tensor, ...]:
        return (_train(x, mean, var, started, momentum, eps),)

    inputs = x.contiguous(), mean, var, started.view(torch.uint8)
    return plans.run(("standardize", momentum, eps), direction, inputs)[0]


def _train(x: Tensor, mean: Tensor, var: Tensor, started: Tensor, momentum: float, eps: float) -> Tensor:
    (n, width), device = x.shape, x.device
    blocks, columns = ceil_div(n, BLOCKS["BLOCK_R"]), ceil_div(width, BLOCKS["BLOCK_H"])
    partials, merged = (
        torch.empty(shape, device=device, dtype=torch.float32) for shape in ((blocks, 2, width), (2, width))
    )
    bad, out = (
        torch.empty(columns, dtype=torch.int32, device=device),
        torch.empty((n, width), dtype=torch.float32, device=device),
    )
    sizes, flags = {"n": n, "width": width}, {"bad": bad, "started": started}
    kernels = _kernels()
    triton_call.launch(
        kernels.standardize_columns_kernel, (blocks, columns), {"x": x, "partials": partials, **sizes}, BLOCKS
    )
    triton_call.launch(
        kernels.standardize_merge_kernel,
        (columns,),
        {"partials": partials, "merged": merged, "bad": bad, **sizes, "blocks": blocks},
        {"ROWS": BLOCKS["BLOCK_R"], "BLOCK_R": 32, "BLOCK_H": BLOCKS["BLOCK_H"]},
    )
    triton_call.launch(
        kernels.standardize_move_kernel,
        (columns,),
        {"merged": merged, **flags, "mean": mean, "var": var, "width": width, "count": columns, "momentum": momentum},
        {"BLOCK": FLAGS, "BLOCK_H": BLOCKS["BLOCK_H"]},
    )
    triton_call.launch(
        kernels.standardize_scale_kernel,
        (blocks, columns),
        {"x": x, "mean": mean, "var": var, **flags, "out": out, **sizes, "count": columns, "eps": eps},
        {"BLOCK": FLAGS, **BLOCKS},
    )
    return out


def _kernels() -> ModuleType:
    from cibr_kernels.nn import triton_statistics

    return triton_statistics
