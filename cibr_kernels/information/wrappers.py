"""What stands around a critic: hooks, averages, DDP, FSDP; and the dtype it computes in.

The fused paths look inside modules, and must miss nothing that a call would do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

FSDP1 = "FullyShardedDataParallel"  # by name: its module takes a while to import


def hooked(module: Any) -> bool:
    """Whether a call of the module runs hooks of its user's.

    torch's own may run: they prepare weights, as FSDP2, pruning and the older weight and spectral norms do.
    """
    if not isinstance(module, nn.Module):
        return False
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(kinds) and any(not _torchs_own(hook) for hooks in kinds for hook in hooks.values())


def _torchs_own(hook: Any) -> bool:
    owner = getattr(hook, "__self__", hook)
    return not isinstance(owner, nn.Module) and any(c.__module__.startswith("torch.") for c in type(owner).__mro__)


def wrapped(module: Any) -> bool:
    """Whether another module stands around it: `opened` and `inside` have something to do."""
    return isinstance(module, (AveragedModel, DistributedDataParallel)) or type(module).__name__ == FSDP1


def opened(module: Any) -> Any:
    """The module inside wrappers that only pass calls on."""
    while isinstance(module, AveragedModel) and not hooked(module):
        module = module.module
    return module


def inside(module: Any) -> Any:
    """The module in DDP or in FSDP1, which have to see one call for each backward; any other module itself."""
    around = isinstance(module, DistributedDataParallel) or type(module).__name__ == FSDP1
    return module.module if around else module


def sharded(module: nn.Module) -> bool:
    """Whether FSDP2's `fully_shard` was applied to the module or to one inside it."""
    return any(hasattr(type(m), "set_requires_gradient_sync") for m in module.modules())


def dtype_for(name: str, t: Tensor, module: Any) -> torch.dtype:
    """The dtype that the module computes `t` in: that of its first floating parameter.

    Raises TypeError where one is float64 and the other is not.
    """
    if not isinstance(module, nn.Module):
        return t.dtype
    for p in module.parameters():
        if p.is_floating_point():
            if p.dtype != t.dtype and torch.float64 in (p.dtype, t.dtype):
                raise TypeError(f"{name} is {t.dtype} but the parameters are {p.dtype}: float64 goes with float64 only")
            return p.dtype
    return t.dtype


def in_its_dtype(name: str, t: Tensor, module: Any) -> Tensor:
    """`t` as the module computes it."""
    return t.to(dtype_for(name, t, module))
