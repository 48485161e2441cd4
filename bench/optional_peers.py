"""Peers that are not on every machine; a row says so where they are missing.

torch-chunked        PyTorch's own linear_cross_entropy in chunks, from 2.13: a call per direction.  Float32 logits and
                     sums whatever the features' dtype, as ours; the loss comes in the features' dtype.
cut-cross-entropy    `pip install '.[peers]'`; its torch.compile path, the one that runs on a CPU: one matmul and one
                     softmax per direction.  Its own kernels are for GPUs.
KeOps                `pip install '.[peers]'`; a C++ loop over pairs, compiled for the formula on first use (most of a
                     minute).  No N x N memory.
inf_cl, memeff, siglip_kernel    for GPUs
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import SCALE, Case
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


def _of_pairs(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda inputs: loss(*(inputs.tensors[name] for name in ("x", "z", "scale")))


def torch_chunked(case: Case) -> Callable[[Inputs], Tensor]:
    """Raises ImportError where PyTorch is older."""
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"linear_cross_entropy in chunks is in PyTorch 2.13 and later, this is {torch.__version__}")
    options = nn.LinearCrossEntropyOptions(acc_policy="accurate", acc_dtype=torch.float32)
    return _of_pairs(partial(both_directions, partial(F.linear_cross_entropy, options=options)))


def cut_cross_entropy(case: Case) -> Callable[[Inputs], Tensor]:
    linear_cross_entropy = _require("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    return _of_pairs(partial(both_directions, partial(linear_cross_entropy, impl="torch_compile")))


def keops(case: Case) -> Callable[[Inputs], Tensor]:
    lazy = _require("pykeops.torch", "pykeops").LazyTensor

    def loss(x: Tensor, z: Tensor, scale: Tensor) -> Tensor:
        scaled = scale * x
        logits = lazy(scaled[:, None]) | lazy(z[None])
        rows, columns = (logits.logsumexp(dim=dim)[:, 0] for dim in (1, 0))
        return ((rows + columns) / 2 - (scaled * z).sum(1)).mean()

    return _of_pairs(loss)


def inf_cl(case: Case) -> Callable[[Inputs], Tensor]:
    """Its two directions, with the mean outside: cal_inf_loss needs a process group for a scale with a gradient."""
    from inf_cl import cal_flash_loss

    def loss(x: Tensor, z: Tensor, scale: Tensor) -> Tensor:
        rows, columns = (cal_flash_loss(a, b, scale=scale, head_dim=256) for a, b in ((x, z), (z, x)))
        return (rows.mean() + columns.mean()) / 2

    return _of_pairs(loss)


def memeff(case: Case) -> Callable[[Inputs], Tensor]:
    """Its temperature is a number without a gradient; stable=False returns the gradient of the loss."""
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return _of_pairs(lambda x, z, scale: loss(x, z))


def siglip_kernel(case: Case) -> Callable[[Inputs], Tensor]:
    """Gradients are made in its forward; logits are rounded to bfloat16, and so is the loss."""
    from siglip_kernel import fused_siglip_loss

    def loss(inputs: Inputs) -> Tensor:
        x, z, scale, bias = (inputs.tensors[name] for name in ("x", "z", "scale", "bias"))
        return fused_siglip_loss(x, z, scale.log(), bias, backend="chunked_bf16")

    return loss
