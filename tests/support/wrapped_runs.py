"""Critics and objectives inside DDP and FSDP2, on the ranks of tests/distributed: each function runs on every rank."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from sharded import DT, DV, D, Errors, Group, averaged, batch, error, mine, objective
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import cibr_kernels as ck

CRITICS: dict[str, Callable[[], nn.Module]] = {
    "concat": lambda: ck.nn.ConcatCritic(DV, D, 8),
    "two layers": lambda: ck.nn.ConcatCritic(DV, D, 8, layers=2),
    "separable": lambda: ck.nn.SeparableCritic(DV, D, 8, 5),
}
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
Sharded = Callable[[nn.Module, Any], Sequence[nn.Module]]
SHARDED: dict[str, Sharded] = {  # the modules that are sharded one by one, the outermost last
    "root": lambda loss: [loss],
    "critics": lambda loss: [*loss.critics.values(), loss],
    "linears": lambda loss: [*(m for m in loss.modules() if isinstance(m, nn.Linear)), loss],
    "both": lambda loss: [*(m for m in loss.modules() if isinstance(m, nn.Linear)), *loss.critics.values(), loss],
}


def in_ddp(group: Group, kind: str, rows: Sequence[int], estimator: str) -> Errors:
    """Errors of the estimate of a critic in DDP, over the rows of all ranks, and of its gradients."""
    torch.manual_seed(4)
    start, whole = CRITICS[kind](), batch(sum(rows))

    def run(dtype: torch.dtype, group: Group | None) -> dict[str, Tensor]:
        critic = copy.deepcopy(start).to(dtype)
        called = critic if group is None else DistributedDataParallel(critic, process_group=group)
        x, z = (t.to(dtype) if group is None else mine(t, rows, group).to(dtype) for t in (whole["xv"], whole["zv"]))
        value = ck.mutual_information(x, z, called, estimator=estimator, process_group=group)
        value.backward()
        return {"value": value.detach()} | {name: p.grad for name, p in critic.named_parameters()}

    truth, one, actual = run(torch.float64, None), run(torch.float32, None), run(torch.float32, group)
    unit = {name: float(name.endswith("bias")) for name in truth}
    return {name: (error(actual[name], t, unit[name]), error(one[name], t, unit[name])) for name, t in truth.items()}


def in_fsdp(group: Group, how: str, kind: str, half: bool) -> dict[str, float]:
    """Errors of the loss, and of all gradients together, of the objective sharded in one of the ways `SHARDED`.

    half: under a policy of bfloat16 parameters, against a bfloat16 module in one process.
    """
    torch.manual_seed(4)
    rows = (6,) * dist.get_world_size(group)
    whole = batch(sum(rows))
    start = objective(None, noise_std=1e-9, estimator="js" if kind == "separable" else "mine")
    if kind != "concat":
        for name, (x, z) in {"image_own": (DV, D), "text_own": (DT, D)}.items():
            start.critics[name] = (
                ck.nn.SeparableCritic(x, z, 8, 5) if kind == "separable" else ck.nn.ConcatCritic(x, z, 8, layers=2)
            )

    def run(group: Group | None) -> tuple[Tensor, dict[str, Tensor]]:
        dtype = torch.bfloat16 if half and group is None else torch.float32
        loss = copy.deepcopy(start).to(dtype)
        loss.process_group = group
        if group is not None:
            policy = {"mp_policy": HALF} if half else {}
            for module in SHARDED[how](loss):
                fully_shard(module, mesh=DeviceMesh.from_group(group, "cpu"), **policy)
        inputs = [(t if group is None else mine(t, rows, group)).to(dtype) for t in whole.values()]
        torch.manual_seed(2)
        for _ in range(2):  # gradients add up
            value = loss(*inputs[:2], 5.0, *inputs[2:])
            value.backward()
        grads = {name: p.grad if group is None else p.grad.full_tensor() for name, p in loss.named_parameters()}
        return value.detach() if group is None else averaged(value, group), grads

    (truth, expected), (value, grads) = run(None), run(group)
    together = [torch.cat([t.flatten() for t in gs.values()]) for gs in (grads, expected)]
    return {"loss": error(value, truth, 1.0), "gradients": error(together[0], together[1].double())}


def in_half(group: Group, kind: str, strategy: str, estimator: str, negatives: Any, dtype: torch.dtype) -> list[float]:
    """Errors of a half-precision critic's estimate over all ranks, and of its gradients, against one process."""
    torch.manual_seed(4)
    rows = (3, 8, 4)
    start, whole = CRITICS[kind]().to(dtype), batch(sum(rows))

    def run(group: Group | None) -> list[Tensor]:
        critic = copy.deepcopy(start)
        x, z = (t.to(dtype) if group is None else mine(t, rows, group).to(dtype) for t in (whole["xv"], whole["zv"]))
        value = ck.mutual_information(
            x, z, critic, estimator=estimator, negatives=negatives, strategy=strategy, process_group=group
        )
        value.backward()
        grads = [p.grad.double() if group is None else averaged(p.grad, group) for p in critic.parameters()]
        return [value.detach(), torch.cat([t.flatten() for t in grads])]

    return [error(ours, one.double()) for ours, one in zip(run(group), run(None), strict=True)]


def refused(group: Group, how: str) -> str:
    """What is said to critics that DDP or FSDP2 stand around and that are called in panels."""
    data, critic = batch(6, torch.float32), CRITICS["two layers" if "sharded" in how else "concat"]()
    if how == "sharded":
        fully_shard(critic, mesh=DeviceMesh.from_group(group, "cpu"))
    elif how == "sharded linear":
        fully_shard(critic.inner, mesh=DeviceMesh.from_group(group, "cpu"))
    else:
        critic.register_forward_hook(lambda *_: None)
        critic = DistributedDataParallel(critic, process_group=group)
    try:
        ck.mutual_information(data["xv"], data["zv"], critic)
    except TypeError as refusal:
        return str(refusal)
    return "nothing"


def poisoned(group: Group, value: float) -> bool:
    """Whether statistics of a batch that is bad on one rank are finite, and the same on all; its loss is NaN on all."""
    loss = objective(group, ema_decay=0.9)
    rows = (3, 8, 4)
    for step in range(3):
        data = {name: mine(t, rows, group).float() for name, t in batch(15).items()}
        if step != 2 and dist.get_rank(group) == 1:
            data["xv" if step == 0 else "zt"][1, 2] = value
        out = loss(data["zv"], data["zt"], 5.0, data["xv"], data["xt"], output_dict=True)
        assert out["image_own" if step == 0 else "text_own"].isfinite() == (step == 2)
    everything = [torch.empty_like(b) for b in loss.buffers()]
    same = True
    for b, first in zip(loss.buffers(), everything, strict=True):
        first.copy_(b)
        dist.broadcast(first, group_src=0, group=group)
        same = same and torch.equal(first, b) and bool(b.isfinite().all())
    return same


def from_meta(group: Group) -> dict[str, Any]:
    """The objective made on the meta device, sharded, given memory, and reset module by module."""
    with torch.device("meta"):
        loss = objective(None, ema_decay=0.9, noise_std=0.1)
    for module in (*loss.critics.values(), loss):
        fully_shard(module, mesh=DeviceMesh.from_group(group, "cpu"))
    loss.to_empty(device="cpu")
    for module in loss.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    found: dict[str, Any] = {name: b.tolist() for name, b in loss.named_buffers()}
    for name in ("x_proj", "z_proj"):
        weight = getattr(loss.critics["image_own"], name).weight.full_tensor()
        found[name] = weight.abs().max().item()
    loss.process_group = group
    rows = (6,) * dist.get_world_size(group)
    data = [mine(t, rows, group).float() for t in batch(sum(rows)).values()]
    found["finite"] = loss(*data[:2], 5.0, *data[2:]).isfinite().item()
    return found


def copies(group: Group) -> list[bool]:
    """What deepcopy and pickle make of losses with a process group."""
    losses = [objective(group), ck.nn.ClipLoss(process_group=group), ck.nn.NTXentLoss(process_group=group)]
    found = []
    for loss in losses:
        found += [copy.deepcopy(loss).process_group is group, pickle.loads(pickle.dumps(loss)).process_group is group]
    world = ck.nn.SigLipLoss(process_group=dist.group.WORLD)
    found.append(pickle.loads(pickle.dumps(copy.deepcopy(world))).process_group is dist.group.WORLD)
    alone = pickle.loads(pickle.dumps(losses[1]))
    alone.process_group = None
    found.append(alone.process_group is None and copy.deepcopy(alone).process_group is None)
    return found


def pickled(group: Group) -> bytes:
    """A loss of this group, for a process that does not have it."""
    return pickle.dumps(ck.nn.ClipLoss(process_group=group))
