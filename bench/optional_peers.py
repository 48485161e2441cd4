"""Peers that are not on every machine; a row says so where they are missing.

torch-chunked        PyTorch's own linear_cross_entropy in chunks, from 2.13: a call per direction.  Float32 logits and
                     sums whatever the features' dtype, as ours; the loss comes in the features' dtype.
cut-cross-entropy    `pip install '.[peers]'`; its torch.compile path, the one that runs on a CPU: one matmul and one
                     softmax per direction.  Its own kernels are for GPUs.
KeOps                `pip install '.[peers]'`; a C++ loop over pairs, compiled for the formula on first use (most of a
                     minute).  No N x N memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.inputs import Inputs


def _require(module: str, package: str) -> ModuleType:
    """Raises ModuleNotFoundError, saying what to install."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{package} is not installed ({error}): pip install '.[peers]'") from None


def both_directions(linear_cross_entropy: Callable[..., Tensor], x: Tensor, z: Tensor, scale: Tensor) -> Tensor:
    """The symmetric loss from a function (features, classes, labels) -> one direction's, which has no scale."""
    labels = torch.arange(len(x), device=x.device)
    rows, columns = (linear_cross_entropy((scale * a).to(a.dtype), b, labels) for a, b in ((x, z), (z, x)))
    return (rows + columns) / 2


def torch_chunked() -> Callable[..., Tensor]:
    """-> (x, z, scale) -> loss.  Raises ImportError where PyTorch is older."""
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"linear_cross_entropy in chunks is in PyTorch 2.13 and later, this is {torch.__version__}")
    options = nn.LinearCrossEntropyOptions(acc_policy="accurate", acc_dtype=torch.float32)
    return partial(both_directions, partial(F.linear_cross_entropy, options=options))


def build_torch_chunked() -> Callable[[Inputs], Tensor]:
    loss = torch_chunked()
    return lambda inputs: loss(*(inputs.tensors[name] for name in ("x", "z", "scale")))


def build_cut_cross_entropy() -> Callable[[Inputs], Tensor]:
    linear_cross_entropy = _require("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    loss = partial(both_directions, partial(linear_cross_entropy, impl="torch_compile"))
    return lambda inputs: loss(*(inputs.tensors[name] for name in ("x", "z", "scale")))


def build_keops() -> Callable[[Inputs], Tensor]:
    lazy = _require("pykeops.torch", "pykeops").LazyTensor

    def loss(inputs: Inputs) -> Tensor:
        x, z, scale = (inputs.tensors[name] for name in ("x", "z", "scale"))
        scaled = scale * x
        logits = lazy(scaled[:, None]) | lazy(z[None])
        rows, columns = (logits.logsumexp(dim=dim)[:, 0] for dim in (1, 0))
        return ((rows + columns) / 2 - (scaled * z).sum(1)).mean()

    return loss
