"""FSDP2: parameters, gradients and optimiser state of the towers spread over ranks, gathered block by block.

PyTorch's modules for it take a second to import, so they are where something is sharded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def shard(model: nn.Module, device: str, world: int) -> None:
    """Shards `model` in place over all ranks.

    A block is an item of a list of modules (a transformer's layers, a ResNet's bottlenecks), outermost ones first.
    """
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device, (world,))
    scalars = {p for p in model.parameters() if p.ndim == 0}  # which FSDP2 does not take: every rank has them whole
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from (item for item in child if any(True for _ in item.parameters()))
        else:
            yield from blocks(child)


def is_sharded(t: Tensor) -> TypeIs[DTensor]:
    module = sys.modules.get("torch.distributed.tensor")  # without which there is none
    return module is not None and isinstance(t, module.DTensor)


def whole(t: Tensor) -> Tensor:
    """A tensor, of all ranks' parts where it is sharded; every rank has to call it."""
    return t.full_tensor() if is_sharded(t) else t


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor spread as `parameter` is, on its device and in its memory format, as a fused update wants it."""
    value = value.to(parameter.device)
    if value.shape != parameter.shape:
        return value
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """0-d; 0 of parameters without gradients."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    kinds = [[g for g in gradients if is_sharded(g) == kind] for kind in (False, True)]
    norms = [whole(nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    if len(norms) > 1:
        return torch.stack(norms).norm()
    return norms[0] if norms else torch.zeros(())
