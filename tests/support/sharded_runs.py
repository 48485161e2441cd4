"""What else the ranks of tests/test_distributed.py do: train, count and keep what they move, refuse and die.

Each function runs on every rank and returns plain numbers; sharded.py has the losses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sharded import (
    DT,
    DV,
    HIDDEN,
    D,
    Errors,
    Group,
    averaged,
    batch,
    critic,
    error,
    mine,
    objective,
    said,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import cibr_kernels as ck
from bench.experiments import sharded as measured
from cibr_kernels.distributed import Shards, merge, set_header_check, traffic
from cibr_kernels.losses.penalty import noisy


# ------------------------------------------------------------------------------------------------ training
class Model(nn.Module):
    """Two linear towers, a temperature and the CIBR objective: inputs -> loss."""

    def __init__(self, group: Group | None, _: str = "gather") -> None:
        super().__init__()
        self.loss = objective(group, ema_decay=0.9, warmup_steps=1, noise_std=1e-9)
        self.image, self.text = nn.Linear(DV, D), nn.Linear(DT, D)
        self.log_scale = nn.Parameter(torch.tensor([1.4]))  # FSDP shards no 0-d parameters

    def forward(self, xv: Tensor, xt: Tensor) -> Tensor:
        zv, zt = F.normalize(self.image(xv), dim=1), F.normalize(self.text(xt), dim=1)
        return self.loss(zv, zt, self.log_scale.exp(), xv, xt)


class Sigmoid(nn.Module):
    """Two linear towers, a temperature, a bias and the sigmoid loss: inputs -> loss."""

    def __init__(self, group: Group | None, strategy: str) -> None:
        super().__init__()
        self.options = {"process_group": group, "strategy": strategy}
        self.image, self.text = nn.Linear(DV, D), nn.Linear(DT, D)
        self.log_scale, self.logit_bias = nn.Parameter(torch.tensor([1.4])), nn.Parameter(torch.tensor([-2.0]))

    def forward(self, xv: Tensor, xt: Tensor) -> Tensor:
        zv, zt = F.normalize(self.image(xv), dim=1), F.normalize(self.text(xt), dim=1)
        return ck.siglip_loss(zv, zt, self.log_scale.exp(), self.logit_bias, **self.options)


def _averaged_by(wrapper: str | None, model: Model | Sigmoid, group: Group) -> tuple[nn.Module, Callable[[bool], Any]]:
    """The model to call, and a context for the micro-batches: gradients are averaged in the last one only."""
    if wrapper == "ddp":
        ddp = DistributedDataParallel(model, process_group=group)
        return ddp, lambda last: nullcontext() if last else ddp.no_sync()
    if wrapper == "fsdp":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(group, "cpu")
        for module in (model.image, model.text, model):
            fully_shard(module, mesh=mesh)
    return model, lambda last: nullcontext()


def training(
    group: Group,
    steps: Sequence[Sequence[int]],
    wrapper: str,
    made: type[Model | Sigmoid] = Model,
    strategy: str = "gather",
) -> Errors:
    """Errors of the gradients accumulated over the steps (rows of each rank), of the losses and of every buffer."""
    torch.manual_seed(4)
    start = made(group, strategy).state_dict()
    data = [batch(sum(rows)) for rows in steps]

    def run(dtype: torch.dtype, wrapper: str | None) -> dict[str, Tensor]:
        model = made(None if wrapper is None else group, strategy).to(dtype)
        model.load_state_dict(start)
        called, context = _averaged_by(wrapper, model, group)
        found: dict[str, Tensor] = {}
        for i, (whole, rows) in enumerate(zip(data, steps, strict=True)):
            inputs = [whole[name] if wrapper is None else mine(whole[name], rows, group) for name in ("xv", "xt")]
            with context(i + 1 == len(steps)):
                loss = called(*(t.to(dtype) for t in inputs))
                loss.backward()
            found[f"loss {i}"] = loss.detach() if wrapper is None else averaged(loss, group)
        for name, p in model.named_parameters():
            grad = p.grad.full_tensor() if wrapper == "fsdp" else p.grad
            found[name] = averaged(grad, group) if wrapper == "loop" else grad
        return found | dict(model.named_buffers())

    truth, one, actual = run(torch.float64, None), run(torch.float32, None), run(torch.float32, wrapper)
    magnitudes = {name: float("loss " in name or name.endswith("out.bias")) for name in truth}
    return {
        name: (error(actual[name], t.double(), magnitudes[name]), error(one[name], t.double(), magnitudes[name]))
        for name, t in truth.items()
    }


# ------------------------------------------------------------------------------------------------ properties
def bits(group: Group) -> list[bytes]:
    """The moments as this rank has them, twice."""
    data, rows = batch(13), (6, 7)
    x, z = mine(data["xv"], rows, group).float(), mine(data["zv"], rows, group).float()
    runs = [torch.stack(ck.critic_moments(x, z, critic("relu"), process_group=group)) for _ in range(2)]
    return [t.detach().numpy().tobytes() for t in runs]


def noise(group: Group, rows: Sequence[int]) -> bool:
    """Whether ranks seeded alike draw one process's noise, each for its rows."""
    z = batch(sum(rows))["zv"].float()
    torch.manual_seed(9)
    whole = noisy(z, 0.3)
    torch.manual_seed(9)
    part = noisy(mine(z, rows, group), 0.3, None, Shards(group, dist.get_rank(group), tuple(rows)))
    return torch.equal(part, mine(whole, rows, group))


def meters(group: Group, n: int, d: int, dtype: torch.dtype, strategy: str, loss: str) -> list[dict[str, Any]]:
    """(calls, bytes) of the forward and of the backward of a loss on n rows per rank."""
    data = batch(n * dist.get_world_size(group), dtype, d)
    rows = (n,) * dist.get_world_size(group)
    x, y = (mine(data[name], rows, group).requires_grad_() for name in ("zv", "zt"))
    with traffic() as forward:
        if loss == "clip":
            out = ck.clip_loss(x, y, 5.0, process_group=group, strategy=strategy)
        elif loss == "siglip":
            out = ck.siglip_loss(x, y, 5.0, -2.0, process_group=group, strategy=strategy)
        else:
            module = ck.nn.ConcatCritic(d, d, HIDDEN)
            out = ck.mutual_information(x, y, module, process_group=group)
    with traffic() as backward:
        out.backward()
    return [{kind: (meter.calls[kind], meter.bytes[kind]) for kind in meter.calls} for meter in (forward, backward)]


def side_by_side(group: Group, name: str, n: int, d: int) -> tuple[dict[str, float], dict[str, float]]:
    """What bench/sharded.py finds of an implementation, on all processes: gradients and bytes."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    budget = ck.stash_budget()
    found = measured.ratios(rank, world, name, n, d), measured.measure(rank, world, name, n, d, torch.float32)
    ck.set_stash_budget(budget)
    return found


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def largest(group: Group, n: int, d: int, strategy: str) -> int:
    """Elements of the largest tensor that clip_loss makes, forward and backward, outside its kernels."""
    rows = (n,) * dist.get_world_size(group)
    data = batch(sum(rows), torch.float32, d)
    x, y = (mine(data[name], rows, group).requires_grad_() for name in ("zv", "zt"))
    ck.set_stash_budget(0)
    with Largest() as mode:
        ck.clip_loss(x, y, 5.0, process_group=group, strategy=strategy).backward()
    return mode.numel


def half(group: Group, strategy: str, autocast: bool) -> Errors:
    """Errors of bfloat16 features against the same features in float64; under autocast they come in float32."""
    rows = (9, 4, 11)
    data = batch(sum(rows), torch.bfloat16)
    leaves = [data["zv"].double().requires_grad_(), data["zt"].double().requires_grad_()]
    ck.clip_loss(*leaves, 14.25).backward()
    parts = [mine(data[n], rows, group).to(torch.float32 if autocast else torch.bfloat16) for n in ("zv", "zt")]
    parts = [t.requires_grad_() for t in parts]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ck.clip_loss(*parts, 14.25, process_group=group, strategy=strategy).backward()
    return {
        str(i): error(part.grad / 3, mine(leaf.grad, rows, group))
        for i, (part, leaf) in enumerate(zip(parts, leaves, strict=True))
    }


def nan(group: Group, strategy: str) -> list[bool]:
    """Whether the loss is NaN on this rank when rank 1 has one in a feature, and whether it was before."""
    rows = (4, 4)
    data = batch(8, torch.float32)
    losses = []
    for value in (0.5, float("nan")):
        data["zt"][5, 2] = value
        parts = [mine(data[name], rows, group) for name in ("zv", "zt")]
        losses.append(ck.clip_loss(*parts, 5.0, process_group=group, strategy=strategy).isnan().item())
    return losses


def headers(group: Group) -> tuple[int, int, int]:
    """Headers of two equal calls under "every call" and under "first call", then of a call of other rows and an old."""
    x = torch.randn(4, D)

    def exchanged(*rows: int) -> int:
        with traffic() as meter:
            for n in rows:
                ck.clip_loss(x[:n], x[:n], 5.0, process_group=group)
        return meter.calls["header"]

    always = exchanged(4, 4)
    set_header_check("first call")
    first, other = exchanged(4, 4), exchanged(3, 4)
    set_header_check("every call")
    return always, first, other


def module_losses(group: Group) -> dict[str, tuple[float, list[float]]]:
    """nn.ClipLoss constructed as open_clip is: the value on this rank, and the features' gradients, over world."""
    rows = (5, 3)
    data = batch(8, torch.float32)
    found = {}
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    for local in (False, True):
        parts = [mine(data[name], rows, group).clone().requires_grad_() for name in ("zv", "zt")]
        loss_fn = ck.nn.ClipLoss(local_loss=local, gather_with_grad=True, process_group=group)
        loss = loss_fn(*parts, 5.0)
        loss.backward()
        found[f"local_loss={local}"] = loss.item(), parts[1].grad.div(world).flatten().tolist()
    whole = [data[name].clone().requires_grad_() for name in ("zv", "zt")]
    loss = ck.nn.ClipLoss()(*whole, 5.0)
    loss.backward()
    found["one process"] = loss.item(), whole[1].grad.split(list(rows))[rank].flatten().tolist()
    return found


def ntxent_module(group: Group) -> tuple[float, float, str]:
    """With lightly's arguments: the ranks' mean, the value of one process, what ranks of unlike temperatures say."""
    rows = (3, 5, 2, 6)
    views = [batch(sum(rows))[name] for name in ("zv", "zt")]
    here = [mine(t, rows, group) for t in views]
    gathered = averaged(ck.nn.NTXentLoss(0.3, gather_distributed=True)(*here), group)
    temperature = 0.1 if dist.get_rank() == 3 else 0.3
    text = said(lambda: ck.nn.NTXentLoss(temperature, gather_distributed=True)(*here))
    return gathered.item(), ck.nn.NTXentLoss(0.3)(*views).item(), text


def as_open_clip(group: Group) -> str:
    """rank and world_size of the default group, and others."""
    x = batch(4, torch.float32)["zv"]
    good = ck.nn.ClipLoss(rank=dist.get_rank(), world_size=dist.get_world_size())(x, x, 5.0)
    expected = ck.clip_loss(x.repeat(4, 1), x.repeat(4, 1), 5.0)
    torch.testing.assert_close(good, expected)
    return said(lambda: ck.nn.ClipLoss(rank=1, world_size=7)(x, x, 5.0))


def compiled(group: Group) -> list[str]:
    """torch.compile runs the loss in a graph break, and refuses with fullgraph."""
    x = batch(8, torch.float32)["zv"][dist.get_rank(group) * 4 :][:4]

    def loss(x: Tensor) -> Tensor:
        return ck.clip_loss(x * 1.0, x, 5.0, process_group=group) * 2

    torch.testing.assert_close(torch.compile(loss, backend="eager")(x), loss(x))
    torch.compiler.reset()
    return [said(lambda: torch.compile(loss, backend="eager", fullgraph=True)(x))]


# ------------------------------------------------------------------------------------------------ errors
def refusal(group: Group, fault: str) -> str:
    """What this rank raises when the last one does something else than the others; then a call that must work."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    x, y, z, w = torch.randn(3, D), torch.randn(3, D), torch.randn(3, DV), torch.randn(3, DT)
    options: dict[str, Any] = {}
    if last and fault == "width":
        x, y = torch.randn(3, D + 1), torch.randn(3, D + 1)
    if last and fault == "dtype":
        x, y = x.double(), y.double()
    if last and fault == "3-d":
        x = x[None]
    if last and fault == "rows":
        y = y[:2]
    if last and fault == "option":
        options = {"one_way": True}
    if last and fault == "strategy":
        options = {"strategy": "ring"}
    if last and fault == "gradient":
        y.requires_grad_()
    scale: Any = -5.0 if last and fault == "scale" else 5.0
    if fault == "scales" and not last:
        scale = torch.full((len(x),), 5.0)
    if fault == "cibr width":
        z = torch.randn(3, DV + last)
        call = lambda: objective(group)(x, y, 5.0, z, w)  # noqa: E731
    elif fault == "loss" and last:
        call = lambda: ck.critic_moments(x, y, ck.nn.SeparableCritic(D, D), process_group=group)  # noqa: E731
    elif fault == "critic":
        call = lambda: ck.critic_moments(  # noqa: E731
            z, x, critic("relu"), negatives=ck.shifts(2 + last), process_group=group
        )
    else:
        call = lambda: ck.clip_loss(x, y, scale, process_group=group, **options)  # noqa: E731
    text = said(call)
    good = torch.ones(2, D)
    assert ck.clip_loss(good, good, 5.0, process_group=group).isfinite()
    return text


def silence(group: Group, seconds: float) -> tuple[str, float]:
    """What a rank says, and when, if the last one never calls; in a group of its own with a short timeout."""
    ranks = list(range(dist.get_world_size(group)))
    short = dist.new_group(ranks, timeout=timedelta(seconds=seconds), use_local_synchronization=True)
    x = torch.ones(2, D)
    ck.clip_loss(x, x, 5.0, process_group=short)
    if dist.get_rank(group) == ranks[-1]:  # which lives on, and waits for its next task
        return "", 0.0
    began = time.monotonic()
    return said(lambda: ck.clip_loss(x, x, 5.0, process_group=short)), time.monotonic() - began


def death(rank: int, store: str, results: Any) -> None:
    """Two processes of their own; the second dies between two calls."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    x = torch.ones(2, D)
    ck.clip_loss(x, x, 5.0, process_group=dist.group.WORLD)
    if rank == 1:
        import os

        os._exit(1)
    began = time.monotonic()
    text = said(lambda: ck.clip_loss(x, x, 5.0, process_group=dist.group.WORLD))
    results.put((text, time.monotonic() - began))


def merged(group: Group) -> list[float]:
    """merge.statistics and merge.mean of (3, 1, 5) rows: errors against those of the whole."""
    rows = (3, 1, 5)
    x = batch(9)["xv"] * 50 + 1000
    part, shards = mine(x, rows, group), Shards(group, dist.get_rank(group), rows)
    var, mean = torch.var_mean(part, 0, unbiased=False)
    mean, var = merge.statistics(mean, var, shards)
    return [
        error(mean, x.mean(0)),
        error(var, x.var(0, unbiased=False)),
        error(merge.mean(part[:, 0], shards), x[:, 0].mean()),
    ]
