"""Peers that `pip install '.[peers]'` brings; a row says so where they are missing.

cut-cross-entropy    its torch.compile path, the one that runs on a CPU: one matmul and one softmax per direction, so
                     twice for a symmetric loss.  Its own kernels are for GPUs.
KeOps                a C++ loop over pairs, compiled for the formula on first use (most of a minute).  No N x N memory.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from bench.inputs import Inputs


def _require(module: str, package: str) -> ModuleType:
    """Raises ModuleNotFoundError, saying what to install."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{package} is not installed ({error}): pip install '.[peers]'") from None


def build_cut_cross_entropy() -> Callable[[Inputs], Tensor]:
    linear_cross_entropy = _require("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy

    def loss(inputs: Inputs) -> Tensor:
        x, z, scale = (inputs.tensors[name] for name in ("x", "z", "scale"))
        labels = torch.arange(len(x))
        directions = ((scale * e).to(e.dtype) for e in (x, z))  # it has no scale of its own
        rows, columns = (
            linear_cross_entropy(e, c, labels, impl="torch_compile") for e, c in zip(directions, (z, x), strict=True)
        )
        return (rows + columns) / 2

    return loss


def build_keops() -> Callable[[Inputs], Tensor]:
    lazy = _require("pykeops.torch", "pykeops").LazyTensor

    def loss(inputs: Inputs) -> Tensor:
        x, z, scale = (inputs.tensors[name] for name in ("x", "z", "scale"))
        scaled = scale * x
        logits = lazy(scaled[:, None]) | lazy(z[None])
        rows, columns = (logits.logsumexp(dim=dim)[:, 0] for dim in (1, 0))
        return ((rows + columns) / 2 - (scaled * z).sum(1)).mean()

    return loss
