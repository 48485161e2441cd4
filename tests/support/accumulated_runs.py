"""`accumulate` inside DDP and FSDP2, on the ranks of tests/distributed: each function runs on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from sharded import Group, averaged, error
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import cibr_kernels as ck

ROWS, PARTS = 12, 3  # of each rank


class Towers(nn.Module):
    """Two towers, dropout in one of them, running statistics in the other, and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(7, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 6))
        self.text = nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6, affine=False))
        self.log_scale = nn.Parameter(torch.tensor([1.6]))  # FSDP2 shards no 0-d parameter

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, y = F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)
        return z, y, self.log_scale.exp().squeeze()


def batch(group: Group) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(dist.get_rank(group))
    return torch.randn(ROWS, 7, generator=g), torch.randn(ROWS, 5, generator=g)


def at_once(model: nn.Module, parts: list[Any], loss: Callable[..., Tensor]) -> Tensor:
    """The step without parts: the graphs of all of them at the same time, one backward.

    DDP sends the first rank's buffers before the first forward only, as for a batch that is encoded in one call.
    """
    found = []
    for k, part in enumerate(parts):
        if isinstance(model, DistributedDataParallel):
            model.require_forward_param_sync = k == 0
        found.append(model(*part))
    columns = zip(*found, strict=True)
    value = loss(*(torch.cat(c) if c[0].ndim else c[0] for c in columns))
    value.backward()
    return value.detach()


def step(group: Group, how: str, parted: bool, steps: int = 2) -> dict[str, Tensor | int]:
    """Gradients, buffers and losses of some steps, and how often gradients were sent in the last one."""
    torch.manual_seed(1)
    model: nn.Module = Towers()
    called, sent = model, []
    if how == "ddp":
        called = DistributedDataParallel(model, process_group=group)

        def hook(state, bucket):  # DDP reads annotations
            sent.append(bucket.index())
            return allreduce_hook(group, bucket)

        called.register_comm_hook(None, hook)
    else:
        for module in (model.image, model.text, model):
            fully_shard(module, mesh=DeviceMesh.from_group(group, "cpu"))

    def loss(z: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return ck.clip_loss(z, y, scale, process_group=group)

    parts = list(zip(*(t.split(ROWS // PARTS) for t in batch(group)), strict=True))
    found: dict[str, Any] = {}
    for k in range(steps):
        torch.manual_seed(100 * k + dist.get_rank(group))
        called.zero_grad()
        sent.clear()
        with CommDebugMode() as counts:
            if parted:
                found[f"loss {k}"] = ck.accumulate(lambda part: called(*part), parts, loss, model=called)
            else:
                found[f"loss {k}"] = at_once(called, parts, loss)
        if how == "fsdp2":
            scattered = [c for op, c in counts.get_comm_counts().items() if "reduce_scatter" in str(op)]
            sent.extend(range(sum(scattered)))
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.1)
    for name, p in model.named_parameters():
        found[name] = p.grad if how == "ddp" else p.grad.full_tensor()
    return found | {f"buffer {name}": b.clone() for name, b in model.named_buffers()} | {"sent": len(sent)}


def compared(group: Group, how: str) -> dict[str, Any]:
    """-> the largest error in parts against without them, and how often gradients were sent with and without."""
    parted, plain = step(group, how, True), step(group, how, False)
    errors = {name: error(parted[name], plain[name].double()) for name in parted if name != "sent"}
    return {"errors": errors, "parted": parted["sent"], "plain": plain["sent"]}


def whole_batch(group: Group) -> float:
    """The error of gradients of DDP in parts against one process with all ranks' rows (no dropout, no statistics)."""
    torch.manual_seed(1)
    image, text = nn.Linear(7, 6), nn.Linear(5, 6)
    towers = nn.ModuleList([image, text])
    alone = copy.deepcopy(towers)
    called = [DistributedDataParallel(t, process_group=group) for t in towers]  # two modules, each with its own
    images, texts = batch(group)
    everything = []
    for t in (images, texts):
        parts = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, t, group=group)
        everything.append(torch.cat(parts))
    ck.accumulate(
        lambda part: [F.normalize(m(t), dim=1) for m, t in zip(called, part, strict=True)],
        (images, texts),
        lambda z, y: ck.clip_loss(z, y, 5.0, process_group=group),
        rows=5,
        model=called,
    )
    z, y = (F.normalize(m(t), dim=1) for m, t in zip(alone, everything, strict=True))
    ck.clip_loss(z, y, 5.0).backward()
    return max(error(a.grad, b.grad.double()) for a, b in zip(towers.parameters(), alone.parameters(), strict=True))


def outer_no_sync(group: Group) -> bool:
    """Whether a caller's own no_sync holds: gradients are this rank's after accumulate in it."""
    torch.manual_seed(1)
    model = DistributedDataParallel(nn.Linear(7, 3), process_group=group)
    (images, _), gradient = batch(group), None
    with model.no_sync():
        ck.accumulate(model, images, lambda z: z.square().mean(), rows=5, model=model)
        gradient = model.module.weight.grad.clone()
    return not torch.allclose(gradient.double(), averaged(gradient, group))
